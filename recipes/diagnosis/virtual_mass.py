"""Measure how much attention goes to virtual keys, by layer, head and position.

    mass_i = sum over virtual keys j of softmax([S_i ; S_i virtual])_j        (B, H, n)

Of inducer-tuning it is lambda, the weight of a query's own key (Chen et al. 2022, eq. 7). Of a
prefix, and of any module with ``total_lse``, it is ``1 - exp(lse - total_lse)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import surgery

BINS = 10  # of positions, from the first token of a text to the last


@dataclass(frozen=True)
class Mass:
    """The mean attention to the virtual keys of one inserted module.

    Attributes:
        site: the path of the attention.
        module: the path of the inserted module.
        by_head: the mean of each head.
        by_position: the mean of each tenth of a text, over all heads.
    """

    site: str
    module: str
    by_head: list[float]
    by_position: list[float]


@torch.no_grad()
def virtual_mass(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> list[Mass]:
    """Return the mean mass of every module that has one, over all tokens that are no padding.

    Args:
        batches: arguments of the model, with an ``attention_mask`` (B, n) where there is padding.
    """
    places = {
        each.path: each
        for report in surgery.summary(model).reports
        for each in report.inserted
        if _measures(model.get_submodule(each.path))
    }
    heads: dict[str, list[Tensor]] = {path: [] for path in places}
    positions: dict[str, list[Tensor]] = {path: [] for path in places}
    training = model.training
    model.eval()
    seen: dict[str, Tensor] = {}
    with _watched(model, places, seen):
        for batch in batches:
            seen.clear()
            model(**batch)
            mask = batch.get("attention_mask")  # (B, n); images have none
            for path, mass in seen.items():
                n = mass.shape[-1]
                at = torch.ones_like(mass[:, 0]) if mask is None else mask[:, -n:]
                at = at.bool()
                heads[path].append(mass.transpose(0, 1)[:, at])  # (H, tokens)
                positions[path].append(torch.stack([mass.mean(1)[at], _tenth(at)[at].float()]))
    model.train(training)
    return [
        Mass(
            each.site.path,
            path,
            torch.cat(heads[path], 1).mean(1).tolist(),
            _by_tenth(torch.cat(positions[path], 1)),
        )
        for path, each in places.items()
        if heads[path]
    ]


def _measures(module: Any) -> bool:
    return hasattr(module, "gate") or hasattr(module, "total_lse")


def _mass(module: Any, reads: Sequence[Tensor], names: Sequence[str]) -> Tensor:
    """Return (B, H, n) from what a module is called with."""
    if hasattr(module, "total_lse"):
        lse = reads[list(names).index("lse")]
        mass: Tensor = 1 - torch.exp(lse - module.total_lse(*reads))
    else:
        mass = module.gate(*reads)
    return mass.nan_to_num().float()  # a query that sees no key is padding


@contextmanager
def _watched(model: nn.Module, places: dict[str, Any], seen: dict[str, Tensor]) -> Iterator[None]:
    """Put the mass of each call of the inserted modules into ``seen``."""

    def watch(path: str, names: Sequence[str]) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[path] = _mass(module, args, names)

        return hook

    handles = [
        model.get_submodule(path).register_forward_pre_hook(watch(path, each.edit.reads))
        for path, each in places.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tenth(real: Tensor) -> Tensor:
    """Return for each token in which tenth of its text it stands; (B, n)."""
    place = real.cumsum(1) - 1
    return (place * BINS // real.sum(1, keepdim=True).clamp(min=1)).clamp(0, BINS - 1)


def _by_tenth(pairs: Tensor) -> list[float]:
    """Return the mean of the first row for each tenth, which the second row names."""
    values, tenths = pairs
    means = [values[tenths == tenth] for tenth in range(BINS)]
    return [float(x.mean()) if len(x) else float("nan") for x in means]
