"""Find the module of a model that says what is added to a score for the distance of its key.

    scores = scale Q K^T + t_h(i - j)        Raffel et al. 2020, arXiv:1910.10683, section 2.1

A table of t_h belongs to one attention, and often to the first of a stack, which hands what it made
of it to the others. Such a module has ``compute_bias(n, m, device, past_seen_tokens)`` and a table
of its own. The nearest one is taken whose numbers are those that were added in the run.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.locator.shared_path import shared
from surgery.patterns import Match, added_to_scores, value
from surgery.plugin import DistanceScores

HIDDEN = -1e4  # an additive mask hides a key with less


def distances(match: Match, path: str, model: nn.Module) -> str:
    """Return the path of the module whose table places the keys of an attention; else ''.

    Args:
        path: that of the attention's host.
    """
    if "query_heads" not in match.ports or "key_heads" not in match.ports:
        return ""
    owners: list[str] = [name for name, module in model.named_modules() if _has_table(module)]
    if not owners:
        return ""
    measured = list(_added(match))
    for owner in sorted(owners, key=lambda name: -shared(name, path)):
        if any(_adds(model.get_submodule(owner), *each) for each in measured):
            return owner
    return ""


def _has_table(module: nn.Module) -> bool:
    compute: Any = getattr(module, "compute_bias", None)
    if not callable(compute) or not any(isinstance(c, nn.Embedding) for c in module.children()):
        return False
    return {"device", "past_seen_tokens"} <= set(inspect.signature(compute).parameters)


def _added(match: Match) -> Iterator[tuple[Tensor, Tensor | float]]:
    """Yield what may have been added to the scores (H, n, m), and how exact it is."""
    query, key = (value(match.ports[name].node) for name in ("query_heads", "key_heads"))
    n, m = query.shape[-2], key.shape[-2]
    if query.is_meta or n != m or m < 3:
        return
    for node in match.core.all_input_nodes:  # an attention in one call is given it
        x = value(node) if isinstance(node, fx.Node) else None
        if isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 4:
            if x.shape[1:] == (match.heads, n, m):
                yield x[0].double(), 2e-2 if x.element_size() < 4 else 1e-5
    if "scores" in match.ports:
        scale = match.scale if match.scale is not None else query.shape[-1] ** -0.5
        measured = added_to_scores(value(match.ports["scores"].node), query, key, scale)
        if measured is not None:
            yield measured


def _adds(owner: nn.Module, added: Tensor, bound: Tensor | float) -> bool:
    """Whether a module's numbers are what was added, wherever a key is seen."""
    n, m = added.shape[-2:]
    with torch.no_grad():
        found = DistanceScores(owner)(n, m, 0, added.device)[0].double()
    seen = added > HIDDEN
    if found.shape != added.shape or not bool(seen.any(-1).all()):
        return False
    return bool((((found - added).abs() < bound) | ~seen).all())
