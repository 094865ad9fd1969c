"""Masks: what a kernel is told of a mask, worked out once for all layers.

A model hands one mask to each of its layers. Its additive form, what is left of it beside a causal
flag, and which queries see nothing are kept for as long as it lives and is not written to (by way
of ``.data`` or NumPy nobody could tell). Inference mode does not count writes: nothing is kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

_BLOCK = 256


_WORTH_IT = 2 * 512  # the kernel skips blocks of 512 keys


def split_causal(mask: Tensor) -> tuple[Tensor, bool]:
    """What a kernel needs to be told beside a causal flag, and whether it is to have that flag.

    Args:
        mask: boolean or additive (..., n, m); query i stands where key i does.

    Returns:
        a row (..., 1, m) and True, if the two say what ``mask`` does. Else ``mask``, and whether it
        hides every later key, and is long enough for that to matter.
    """
    n, m = mask.shape[-2:] if mask.dim() > 1 else (1, 1)
    if n < _WORTH_IT or m < _WORTH_IT:
        return mask, False
    hidden = False if mask.dtype == torch.bool else float("-inf")
    row, alike = mask[..., -1:, :], True
    later = torch.ones(_BLOCK, _BLOCK, dtype=torch.bool, device=mask.device).triu(1)
    for first in range(0, n, _BLOCK):
        rows = mask[..., first : first + _BLOCK, :]
        before, near, far = rows.tensor_split((first, first + _BLOCK), -1)
        after = later[: near.shape[-2], : near.shape[-1]]
        if not _all(far, hidden) or not _all(near.masked_fill(~after, hidden), hidden):
            return mask, False
        corner = row[..., first : first + _BLOCK].masked_fill(after, hidden)
        alike = alike and _all(before, row[..., :first]) and _all(near, corner)
    return (row, True) if alike else (mask, True)


def hides_all_keys(mask: Tensor, n: int = 1) -> Tensor:
    """Which queries of an additive mask (..., n, m) see no key at all: (..., n).

    Of one row (..., 1, m) beside the causal flag, for each of ``n`` queries.
    """
    if mask.shape[-1] == 0:
        return torch.ones(mask.shape[:-1], dtype=torch.bool, device=mask.device)
    if mask.shape[-2] < n:
        best = mask[..., 0, :n].cummax(-1).values
        most = best[..., -1:].expand(*best.shape[:-1], n - best.shape[-1])
        return torch.cat([best, most], -1) == float("-inf")
    return mask.amax(-1) == float("-inf")


def _all(x: Tensor, value: Tensor | bool | float) -> bool:
    return bool((x == value).all())


class KernelMask(NamedTuple):
    """What a kernel is told of a mask.

    Attributes:
        additive: zero or a bias where a key is seen, -inf where it is not; (..., n, m), or
            (..., 1, m) beside the flag; None if that is the mask itself.
        is_causal: whether the kernel is to have the causal flag, too.
        blind: (..., n), which queries see no key at all; None if each sees one.
    """

    additive: Tensor | None
    is_causal: bool
    blind: Tensor | None


_known: Any = WeakIdKeyDictionary()


def kernel_mask(
    mask: Tensor | None, is_causal: bool, query: Tensor
) -> tuple[Tensor | None, bool, Tensor | None]:
    """What a kernel is told of these arguments of SDPA, see :class:`KernelMask`."""
    if mask is None:
        return None, is_causal, None
    dtype = query.dtype
    if is_causal:  # beside a mask; few ask for that
        later = torch.ones(query.shape[-2], mask.shape[-1], dtype=torch.bool, device=mask.device)
        additive = _additive(mask, dtype)
        hidden = additive.masked_fill(later.triu(1), float("-inf"))
        return additive, True, hides_all_keys(hidden)
    if type(mask) is not Tensor or not mask.is_cpu:  # a GPU is not to wait; a tracer cannot know
        made = _kernel_mask(mask, dtype, look=False)
    elif mask.is_inference() or torch.is_inference_mode_enabled():  # nobody counts what is written
        made = _kernel_mask(mask, dtype, look=True)
    else:
        stamp = (mask._version, dtype)
        before, made = _known.get(mask, (None, None))
        if before != stamp:
            with _disable_current_modes():  # a checkpoint that runs again will not come by here
                made = _kernel_mask(mask, dtype, look=True)
            _known[mask] = stamp, made
    return (mask if made.additive is None else made.additive), made.is_causal, made.blind


def _kernel_mask(mask: Tensor, dtype: torch.dtype, look: bool) -> KernelMask:
    """``look`` at values, which takes a moment, or do without."""
    n = mask.shape[-2]
    left, is_causal = split_causal(mask) if look else (mask, False)
    additive = _additive(left, dtype)
    hidden = hides_all_keys(additive, n)
    blind = None if look and not hidden.any() else hidden
    if additive is mask:
        return KernelMask(None, is_causal, blind)
    # A view would keep the mask alive, and with it what is kept of it.
    return KernelMask(additive.clone() if additive is left else additive, is_causal, blind)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """SDPA hands its kernels an additive mask too, so the bits stay the same."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), float("-inf"))
