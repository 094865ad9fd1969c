"""Fingerprint: are these the weights that an adapter was trained upon?

For some matrices W of a base the adapter's JSON holds

    <s, W> / |W|        s_i = +1 or -1, by a hash of i; of W its first 65,536 numbers

which is about N(0, 1) whatever W is. A relative change eps of W moves it by about eps: the rounding
to bfloat16 by 0.001, fine-tuning by more, another initialisation by 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

_MATRICES, _NUMBERS, _ALIKE = 16, 65_536, 3e-3


def fingerprint(model: nn.Module, without: Collection[str]) -> dict[str, float]:
    """One number for each of up to 16 matrices, of those that are not named in ``without``."""
    known = [n for n, p in model.named_parameters() if n not in without and _readable(p)]
    step = -(-len(known) // _MATRICES) or 1
    return {name: _number(model.get_parameter(name)) for name in known[::step]}


def warn_of_other_weights(model: nn.Module, saved: Mapping[str, float], folder: object) -> None:
    """Warn if the base has other weights than the one that ``saved`` was taken from.

    What cannot be read here (other names, quantised weights, the meta device) is not compared.
    """
    own = dict(model.named_parameters())
    gaps = {n: abs(_number(own[n]) - x) for n, x in saved.items() if n in own and _readable(own[n])}
    if not gaps or (sum(gap**2 for gap in gaps.values()) / len(gaps)) ** 0.5 <= _ALIKE:
        return
    warnings.warn(
        f"the adapter in {folder} was trained upon other weights than this {type(model).__name__} "
        f"has: {max(gaps, key=lambda n: gaps[n])} differs most. It is loaded all the same; results "
        "will not be those of its training. See 'base' in surgery.json for where it belongs.",
        stacklevel=3,
    )


def _readable(parameter: Tensor) -> bool:
    wide = parameter.is_floating_point() and parameter.element_size() >= 2
    plain = type(parameter) in (nn.Parameter, Tensor) and not parameter.is_meta
    return plain and wide and parameter.dim() >= 2 and parameter.numel() > 0


def _number(parameter: Tensor) -> float:
    numbers = parameter.detach().reshape(-1)[:_NUMBERS].double().cpu()
    signs = (torch.arange(len(numbers)) * 2_654_435_761 >> 20 & 1).double() * 2 - 1
    return float(signs @ numbers / numbers.norm().clamp(min=1e-30))
