"""Let edited attention weights mix the values, where one call returns both weights and context.

before    C, A = attention(q, K, V, mask)                   A is returned, and mixes nothing more
after     C, A = attention(...); C = mixed(A, V, C)         C = A V, from A as edits leave it
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgery.errors import PortError
from surgery.patterns import Match, value

_CLOSE = 1e-2  # of a context in bfloat16, relative to its largest number


def let_weights_mix(match: Match) -> None:
    """Compute the context of an attention call anew from its weights, once.

    An attention that computes its softmax itself mixes what an edit leaves anyway.

    Raises:
        PortError: the weights times the values are not this attention's context.
    """
    weights, context, values = (match.ports[n] for n in ("weights", "context", "value_heads"))
    if not match.core.meta.get("attention") or context.node.target is mixed:
        return
    old, graph = context.node, context.node.graph
    given = value(weights.node), value(values.node), value(old)
    if not all(isinstance(x, Tensor) for x in given) or not _explains(*given):
        raise PortError(
            f"{match.key}: the port 'weights' can be read here and not edited: the context of this "
            "attention is not its weights times its values."
        )
    order = {node: i for i, node in enumerate(graph.nodes)}
    last = max(weights.node, values.node, old, key=lambda node: order[node])
    with graph.inserting_after(last):
        new = graph.call_function(mixed, (weights.node, values.node, old))
    new.meta.update(old.meta)
    for user in list(old.users):
        if user is not new:
            user.replace_input_with(old, new)
    for port in match.ports.values():
        if port.node is old:
            port.node = new


def mixed(weights: Tensor, values: Tensor, context: Tensor) -> Tensor:
    """Return ``weights @ values`` as (B, n, H, d), in the dtype of ``context``.

    Shape: weights (B, H, n, m), values (B, G, m, d), context (B, n, H, d)
    """
    groups = weights.shape[1] // values.shape[1]
    if groups > 1:
        values = values.repeat_interleave(groups, 1)
    made = torch.matmul(weights.to(values.dtype), values).transpose(1, 2)
    return made.to(context.dtype).contiguous()


def _explains(weights: Any, values: Any, context: Any) -> bool:
    """Whether a context is what its weights mix."""
    if weights.dim() != 4 or values.dim() != 4 or weights.shape[1] % values.shape[1]:
        return False
    if (len(weights), weights.shape[-1]) != (len(values), values.shape[-2]):
        return False
    if context.shape != (*weights.shape[:3:2], weights.shape[1], values.shape[-1]):
        return False
    if weights.is_meta:
        return True
    with torch.no_grad():
        again = mixed(weights, values, context)
        size = context.abs().max().clamp(min=1e-6)
        return bool((again - context).abs().max() <= _CLOSE * size)
