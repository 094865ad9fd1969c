"""Measure what training has changed: norms, and the effective rank of low-rank updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import surgery
from surgery import StartsWithProduct


@dataclass(frozen=True)
class Update:
    """What one inserted module has learnt.

    Attributes:
        module: its path.
        port: what it edits.
        moved: the norm of the change of its parameters since the start.
        norm: the Frobenius norm of its update of a weight, ``A^T B``; None if it is none.
        rank: the effective rank of that update, ``exp(H(p))``, p its singular values over their sum
            (Roy and Vetterli 2007); None as above, and of an update that is zero.
    """

    module: str
    port: str
    moved: float
    norm: float | None
    rank: float | None


@torch.no_grad()
def updates(before: nn.Module, after: nn.Module) -> list[Update]:
    """Compare the inserted modules of two models with the same splices."""
    found = []
    for report in surgery.summary(after).reports:
        for each in report.inserted:
            old, new = before.get_submodule(each.path), after.get_submodule(each.path)
            start, end = _numbers(old), _numbers(new)
            moved = [
                float((x - start[name]).square().sum())
                for name, x in end.items()
                if name in start and start[name].shape == x.shape
            ]
            norm, rank = _of_weight(new)
            found.append(Update(each.path, each.edit.port, sum(moved) ** 0.5, norm, rank))
    return found


def _numbers(module: Any) -> dict[str, Tensor]:
    """Return what inference needs of a module: its parameters, or what it makes of them."""
    plain = module.plain_state() if hasattr(module, "plain_state") else None
    named = dict(module.named_parameters()) if plain is None else plain
    return {name: x.detach().float().cpu() for name, x in named.items() if x.is_floating_point()}


def _of_weight(module: Any) -> tuple[float | None, float | None]:
    """Return the norm and the effective rank of an update of a weight, ``x -> (x A^T) B``."""
    factor = module.first_factor() if isinstance(module, StartsWithProduct) else None
    if factor is None or not hasattr(module, "fold"):
        return None, None
    basis = torch.eye(len(factor)).to(factor)
    b = module.after_product(basis) - module.after_product(torch.zeros_like(basis))  # no bias
    values = singular_values(factor.float(), b.float())
    norm = float(values.norm())
    return norm, effective_rank(values) if norm else None


def singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Return the singular values of ``a.T @ b``, a (r, d_in), b (r, d_out)."""
    left, right = torch.linalg.qr(a.T).R, torch.linalg.qr(b.T).R
    values: Tensor = torch.linalg.svdvals(left @ right.T)
    return values


def effective_rank(values: Tensor) -> float:
    """Return ``exp(-sum p log p)`` of singular values, p their shares."""
    shares = values / values.sum()
    return float(torch.exp(torch.special.entr(shares).sum()))
