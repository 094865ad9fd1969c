"""Causal: does an additive mask hide every later key, so that a kernel may skip them?

A mask of causality and padding is causal still. SDPA takes a mask or the causal flag, not both; its
kernel on the CPU takes both, and then leaves out what the mask would hide: at 2048 tokens it takes
0.6 of the time, with the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HIDDEN = float("-inf")
_BLOCK = 256
_WORTH_IT = 2 * 512  # the kernel skips blocks of 512 keys


def hides_later_keys(mask: Tensor) -> bool:
    """Is ``mask`` (..., n, m) -inf wherever a key comes after its query, and long enough to matter?

    Query i stands where key i does, as the causal flag aligns them.
    """
    n, m = mask.shape[-2:] if mask.dim() > 1 else (1, 1)
    if n < _WORTH_IT or m < _WORTH_IT or not _hidden(mask[..., 0, 1:]):
        return False
    for first in range(0, n, _BLOCK):
        rows = mask[..., first : first + _BLOCK, first + 1 :]
        near, far = rows[..., :_BLOCK], rows[..., _BLOCK:]
        if bool((near != _HIDDEN).triu().any()) or not _hidden(far):
            return False
    return True


def hides_all_keys(mask: Tensor) -> Tensor:
    """Which queries of an additive mask (..., n, m) see no key at all: (..., n)."""
    if mask.shape[-1] == 0:
        return torch.ones(mask.shape[:-1], dtype=torch.bool, device=mask.device)
    return mask.amax(-1) == _HIDDEN


def _hidden(mask: Tensor) -> bool:
    return mask.numel() == 0 or bool(mask.amax() == _HIDDEN)
