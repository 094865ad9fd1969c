"""Tell whether a base has the weights that an adapter was trained with.

For up to 16 matrices W of the base, a saved adapter holds the number

    <s, W> / |W|        s_i = +1 or -1, by a hash of i; W: the first 65,536 numbers of the matrix

The number is distributed about as N(0, 1) whatever W is. A relative change eps of W moves it by
about eps: rounding to bfloat16 by 0.001, fine-tuning by more, another initialisation by 1. The
bound between equal and other weights is a root mean square of 0.003.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

_MATRICES, _NUMBERS, _ALIKE = 16, 65_536, 3e-3


def fingerprint(model: nn.Module, without: Collection[str]) -> dict[str, float]:
    """Return the number of each of up to 16 matrices, by name; none is named in ``without``.

    A matrix with values that are not finite has no such number and is left out.
    """
    known = [n for n, p in model.named_parameters() if n not in without and _readable(p)]
    step = -(-len(known) // _MATRICES) or 1
    numbers = {name: _number(model.get_parameter(name)) for name in known[::step]}
    return {name: number for name, number in numbers.items() if math.isfinite(number)}


def warn_of_other_weights(model: nn.Module, saved: Mapping[str, float], folder: object) -> None:
    """Warn if the weights of ``model`` are not those whose fingerprint is ``saved``.

    Matrices that cannot be read here are not compared: other names, quantised weights, the meta
    device.
    """
    own = dict(model.named_parameters())
    gaps = {n: abs(_number(own[n]) - x) for n, x in saved.items() if n in own and _readable(own[n])}
    if not gaps or (sum(gap**2 for gap in gaps.values()) / len(gaps)) ** 0.5 <= _ALIKE:
        return
    warnings.warn(
        f"the adapter in {folder} was trained with other weights than this {type(model).__name__} "
        f"has: {max(gaps, key=lambda n: gaps[n])} differs most. It is loaded all the same, but its "
        "results will not be those of its training. See 'base' in surgery.json for its base.",
        stacklevel=3,
    )


def _readable(parameter: Tensor) -> bool:
    """Whether a parameter is a plain floating-point matrix of at least 16 bits with values."""
    wide = parameter.is_floating_point() and parameter.element_size() >= 2
    plain = type(parameter) in (nn.Parameter, Tensor) and not parameter.is_meta
    return plain and wide and parameter.dim() >= 2 and parameter.numel() > 0


def _number(parameter: Tensor) -> float:
    """Return ``<s, W> / |W|``; s_i is a bit of Knuth's multiplicative hash of i."""
    numbers = parameter.detach().reshape(-1)[:_NUMBERS].double().cpu()
    signs = (torch.arange(len(numbers)) * 2_654_435_761 >> 20 & 1).double() * 2 - 1
    return float(signs @ numbers / numbers.norm().clamp(min=1e-30))
