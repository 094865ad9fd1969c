"""Convert an attention mask to the form a fused kernel takes, once per mask rather than per layer.

A model passes one mask to all of its layers. The result for a mask (:class:`KernelMask`) is kept
for as long as the mask lives and is not written to: a weak reference and the tensor's version
counter tell. A write through ``.data`` or NumPy does not move that counter and goes unnoticed. In
inference mode tensors have no counter, so nothing is kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

_BLOCK = 256


_MIN_LENGTH = 2 * 512  # the CPU kernel skips hidden blocks of 512 keys


def split_causal(mask: Tensor) -> tuple[Tensor, bool]:
    """Split a causal mask into SDPA's ``is_causal`` flag and the padding mask that remains.

    Args:
        mask: boolean or additive (..., n, m); query i stands at the position of key i.

    Returns:
        the mask that remains, and the flag:
        a row (..., 1, m) and True, if the flag and that row together equal ``mask``;
        ``mask`` and True, if ``mask`` hides every later key but its rows differ otherwise;
        ``mask`` and False, if it does not, or is too short for the flag to save time.

    Cost: one pass over the mask, in blocks of rows; none if it is short.
    """
    n, m = mask.shape[-2:] if mask.dim() > 1 else (1, 1)
    if n < _MIN_LENGTH or m < _MIN_LENGTH:
        return mask, False
    hidden = False if mask.dtype == torch.bool else float("-inf")
    row, same_rows = mask[..., -1:, :], True
    later = torch.ones(_BLOCK, _BLOCK, dtype=torch.bool, device=mask.device).triu(1)
    for first in range(0, n, _BLOCK):
        rows = mask[..., first : first + _BLOCK, :]
        # The keys before the block of rows, those at its positions, and all later ones.
        before, near, far = rows.tensor_split((first, first + _BLOCK), -1)
        after = later[: near.shape[-2], : near.shape[-1]]
        if not _all_equal(far, hidden) or not _all_equal(near.masked_fill(~after, hidden), hidden):
            return mask, False
        corner = row[..., first : first + _BLOCK].masked_fill(after, hidden)
        same_rows = same_rows and _all_equal(before, row[..., :first]) and _all_equal(near, corner)
    return (row, True) if same_rows else (mask, True)


def hides_all_keys(mask: Tensor, n: int = 1) -> Tensor:
    """Return which queries of an additive mask see no key at all.

    Shape: (..., n, m) -> (..., n); a row (..., 1, m) combined with the causal flag -> (..., n),
        n being the number of queries.
    """
    if mask.shape[-1] == 0:
        return torch.ones(mask.shape[:-1], dtype=torch.bool, device=mask.device)
    if mask.shape[-2] < n:
        best = mask[..., 0, :n].cummax(-1).values
        most = best[..., -1:].expand(*best.shape[:-1], n - best.shape[-1])
        return torch.cat([best, most], -1) == float("-inf")
    return mask.amax(-1) == float("-inf")


def _all_equal(x: Tensor, value: Tensor | bool | float) -> bool:
    return bool((x == value).all())


class KernelMask(NamedTuple):
    """A mask in the form that a fused kernel takes.

    Attributes:
        additive: zero or a bias where a query sees a key, -inf where it does not; (..., n, m), or
            (..., 1, m) if ``is_causal`` adds the rest; None if it is the given mask itself.
        is_causal: the kernel's causal flag.
        blind: (..., n), which queries see no key at all; None if every query sees one.
    """

    additive: Tensor | None
    is_causal: bool
    blind: Tensor | None


_known: Any = WeakIdKeyDictionary()


def kernel_mask(
    mask: Tensor | None, is_causal: bool, query: Tensor
) -> tuple[Tensor | None, bool, Tensor | None]:
    """Return the additive mask, the causal flag and the blind queries for a fused kernel.

    Args:
        mask, is_causal: as SDPA takes them.
        query: (B, H, n, d); its dtype is that of the additive mask.

    Returns:
        the fields of a :class:`KernelMask`, with the mask itself where ``additive`` is None.
    """
    if mask is None:
        return None, is_causal, None
    dtype = query.dtype
    if is_causal:  # a mask and the flag: rare, so the result is not kept
        later = torch.ones(query.shape[-2], mask.shape[-1], dtype=torch.bool, device=mask.device)
        additive = _additive(mask, dtype)
        hidden = additive.masked_fill(later.triu(1), float("-inf"))
        return additive, True, hides_all_keys(hidden)
    if type(mask) is not Tensor or not mask.is_cpu:
        # Reading values would make the CPU wait for a GPU; a tracer's tensors have no values.
        result = _kernel_mask(mask, dtype, read_values=False)
    elif mask.is_inference() or torch.is_inference_mode_enabled():  # no version counter
        result = _kernel_mask(mask, dtype, read_values=True)
    else:
        stamp = (mask._version, dtype)
        before, result = _known.get(mask, (None, None))
        if before != stamp:
            # Selective checkpointing replays the operators of a forward. The recomputation finds
            # the kept result and runs none of these, so the mode must not record them here.
            with _disable_current_modes():
                result = _kernel_mask(mask, dtype, read_values=True)
            _known[mask] = stamp, result
    return (mask if result.additive is None else result.additive), result.is_causal, result.blind


def _kernel_mask(mask: Tensor, dtype: torch.dtype, read_values: bool) -> KernelMask:
    """Convert a mask; ``read_values`` allows a causal flag and a missing ``blind``."""
    n = mask.shape[-2]
    remaining, is_causal = split_causal(mask) if read_values else (mask, False)
    additive = _additive(remaining, dtype)
    hidden = hides_all_keys(additive, n)
    blind = None if read_values and not hidden.any() else hidden
    if additive is mask:
        return KernelMask(None, is_causal, blind)
    # ``additive`` may be a view of the mask. A kept view would keep the mask alive, and the weak
    # reference in ``_known`` would never be cleared.
    return KernelMask(additive.clone() if additive is remaining else additive, is_causal, blind)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a boolean mask as an additive one: the conversion of SDPA, for the same bits."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), float("-inf"))
