"""Fold a constant that is added to a block's output into the bias that the block adds last.

    y = x + W a + b        y + c = x + W a + (b + c)

Only a constant folds: x does not pass through W, so a factor of y or a map of y would miss it. The
module is asked on two random inputs, and its ``fold`` on a bias of zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from surgery.interop import onloaded
from surgery.plugin import Port
from surgery.splicer import Inserted


def why_no_constant(inserted: Inserted, module: nn.Module, port: Port) -> str:
    """Return why a module at a block's output cannot be folded into a bias; '' if it can."""
    edit = inserted.edit
    if not port.bias:
        return "the block adds no bias last of all into which a constant could be folded"
    more = sorted(set(edit.reads) - {edit.port})
    if more:
        return f"its module also reads {', '.join(more)}, and only a constant folds there"
    if edit.verb not in ("insert", "add"):
        return f"it does more than add to port {port.name!r}, and only a constant folds there"
    try:
        with torch.no_grad(), onloaded([module]):
            made, folded = _updates(module, edit.verb, port.width), _folded(module, port.width)
    except Exception:  # a plugin's code may raise anything
        return "its module fails on a random input, so it is not known to add a constant"
    constant = bool((made - made[:1, :1]).abs().max() <= 1e-5 * made.abs().max().clamp(min=1))
    if not constant or not torch.allclose(made[0, 0], folded.to(made), rtol=1e-4, atol=1e-5):
        return "what it adds depends on the hidden states, and only a constant folds into a bias"
    return ""


def _updates(module: nn.Module, verb: str, width: int) -> Tensor:
    """Return what a module adds to random hidden states, (2, 3, width)."""
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    draws = torch.Generator().manual_seed(0)
    y = torch.randn(2, 3, width, generator=draws).to(like)
    made: Tensor = module(y)
    return made.expand_as(y) if verb == "add" else made - y


def _folded(module: Any, width: int) -> Tensor:
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    weight, bias = module.fold(None, torch.zeros(width, dtype=torch.float64, device=like.device))
    assert weight is None
    folded: Tensor = bias
    return folded
