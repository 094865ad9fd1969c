"""Take an attention call apart, so that its scores and weights can be edited.

    before    C, A = attention(q, K, V, mask)        A is returned, and mixes nothing more
    weights   C, A = attention(...); C = A V         from A as edits leave it
    scores    S = s q K^T + mask; A = softmax S; C = A V

A library's call that returns weights computes just this; where it computes something else, as with
sinks or a soft cap, the port can be read and not edited. An attention that computes its softmax in
sight needs none of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from surgery.errors import PortError
from surgery.interop import real_tensors
from surgery.patterns import Match, value

_CLOSE = 1e-2  # in bfloat16, relative to the largest number


def let_weights_mix(match: Match) -> None:
    """Compute the context of an attention call anew from its weights, once.

    Raises:
        PortError: the weights times the values are not this attention's context.
    """
    weights, context, values = (match.ports[n] for n in ("weights", "context", "value_heads"))
    if not match.core.meta.get("attention") or context.node.target is mixed:
        return
    given = [value(port.node) for port in (weights, values)]
    _require(_fit(*given) and _close(_run(mixed, *given), value(context.node)), match, "weights")
    last = _last(weights.node, values.node, context.node)
    _replace(match, context.node, last, mixed, (weights.node, values.node))


def open_scores(match: Match) -> None:
    """Compute an attention call in three steps, once, so that its scores are a node.

    Raises:
        PortError: the steps do not give this attention's weights and context, or a method that
            reads the lse has been spliced in before.
    """
    core = match.core
    if not core.meta.get("attention") or match.ports["scores"].node.target is scores_of:
        return
    if match.exposed:
        raise PortError(
            f"{match.key}: a method before this one reads the lse, which no longer is that of "
            "edited scores. Splice this method in first."
        )
    if match.ports["context"].node.target is mixed:
        raise PortError(
            f"{match.key}: the weights are edited before the scores, which they come from, so that "
            "edit would be lost. Edit 'scores' first."
        )
    names = ("module", "query", "key", "value", "attention_mask")
    given: dict[str, Any] = dict(zip(names, core.args, strict=False)) | dict(core.kwargs)
    module, query, key, values = (given[name] for name in names[:4])
    mask, scale, drop = (given.get(n) for n in ("attention_mask", "scaling", "dropout"))
    examples = [value(x) if isinstance(x, fx.Node) else x for x in (query, key, mask, scale)]
    old_weights, old_context = match.ports["weights"].node, match.ports["context"].node
    fits = _fit(value(old_weights), value(values))
    made = _run(scores_of, *examples) if fits else None
    alike = made is not None and made.shape == value(old_weights).shape
    weighted = _run(weights_of, made, value(values), None, 0.0) if alike else None
    done = (value(old_weights), value(values), value(old_context))
    computes = weighted is not None and (
        _computes(weighted, *done) or _computes(weighted, *done, drop=drop or 0.0)
    )
    _require(computes, match, "scores")
    graph, last = core.graph, _last(core, old_weights, old_context)
    with graph.inserting_after(last):
        scores = graph.call_function(scores_of, (query, key, mask, scale))
    scores.meta.update(core.meta, value=made)
    scores.meta.pop("attention")
    new = _replace(match, old_weights, scores, weights_of, (scores, values, module, drop or 0.0))
    new.meta.update(scores.meta, value=value(old_weights))
    _replace(match, old_context, new, mixed, (new, values))
    if not match.stream:
        for node in (old_weights, old_context, core):
            if not node.users:
                graph.erase_node(node)
        gone = {old_weights, old_context, core}
        match.nodes = [*(node for node in match.nodes if node not in gone), scores, new]
    match.core, match.softmax_input = new, scores
    match.ports["scores"].node = scores


def scores_of(query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Return ``scale q K^T + mask`` (B, H, n, m) of query (B, H, n, d) and key (B, G, m, d)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    made = torch.matmul(query, _repeated(key, query.shape[1]).transpose(2, 3)) * scale
    return made if mask is None else made + mask


def weights_of(scores: Tensor, values: Tensor, module: Any, drop: float) -> Tensor:
    """Return the softmax of scores (B, H, n, m), in the dtype of the values, under dropout."""
    made = F.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
    return F.dropout(made, drop, module.training) if drop else made


def mixed(weights: Tensor, values: Tensor) -> Tensor:
    """Return ``weights @ values`` as (B, n, H, d).

    Shape: weights (B, H, n, m), values (B, G, m, d)
    """
    values = _repeated(values, weights.shape[1])
    return torch.matmul(weights.to(values.dtype), values).transpose(1, 2).contiguous()


def _repeated(x: Tensor, heads: int) -> Tensor:
    groups = heads // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, 1)


def _last(*nodes: fx.Node) -> fx.Node:
    order = {node: i for i, node in enumerate(nodes[0].graph.nodes)}
    return max(nodes, key=lambda node: order[node])


def _replace(match: Match, old: fx.Node, after: fx.Node, target: Any, args: Any) -> fx.Node:
    """Add a call behind a node, in the place of an old node for its users and ports."""
    graph = old.graph
    users = list(old.users)
    with graph.inserting_after(after):
        new = graph.call_function(target, args)
    new.meta.update(old.meta)
    for user in users:
        if user is not new:
            user.replace_input_with(old, new)
    for port in match.ports.values():
        if port.node is old:
            port.node = new
    return new


def _require(holds: bool, match: Match, port: str) -> None:
    if not holds:
        raise PortError(
            f"{match.key}: the port {port!r} can be read here and not edited: this attention is "
            "not the softmax of its scaled and masked scores times its values."
        )


def _fit(weights: Any, values: Any) -> bool:
    """Whether weights (B, H, n, m) can mix values (B, G, m, d)."""
    if not all(isinstance(x, Tensor) and x.dim() == 4 for x in (weights, values)):
        return False
    grouped = weights.shape[1] % values.shape[1] == 0
    return grouped and (len(weights), weights.shape[3]) == (len(values), values.shape[2])


def _computes(
    made: Tensor, weights: Tensor, values: Tensor, context: Tensor, drop: float = 0.0
) -> bool:
    """Whether an attention has these weights and this context, under dropout of its weights.

    Dropout sets weights to 0 and divides the others by ``1 - drop``; those are compared.
    """
    if drop and not weights.is_meta:
        kept = weights != 0
        made, close = made * kept, weights * (1 - drop)
        return _close(made, close) and _close(_run(mixed, weights, values), context)
    return _close(made, weights) and _close(_run(mixed, made, values), context)


def _run(function: Any, *args: Any) -> Any:
    with torch.no_grad(), real_tensors():
        return function(*args)


def _close(new: Any, old: Any) -> bool:
    if not isinstance(old, Tensor) or new.shape != old.shape:
        return False
    if old.is_meta:
        return True
    size = old.abs().max().clamp(min=1e-6)
    return bool((new - old).abs().max() <= _CLOSE * size)
