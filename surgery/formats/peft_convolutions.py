"""Say how PEFT lays out LoRA of a convolution, and turn its factors into those of the plugin.

    PEFT    y = x * W + b + s (B (x * A) + c)     A (r, in, h, w), over all channels in
                                                  B (out, r / groups, 1, 1), in groups
    here    a (r, in / groups, h, w) and b (r, out): the groups share A, each for its channels
            or, ``across_groups``, a (r, in, h, w) and b (r / groups, out): PEFT's own

With one group the three are the same. What the groups share here is a LoRA of rank ``r groups`` in
PEFT, whose A is zero at the channels of other groups. A convolution of one position is a projection
here, with a (r, in) and b (r, out).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SpliceError
from surgery.formats.foreign import Foreign

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Gather = Callable[[Tensor], Tensor]


def convolution_at(model: nn.Module, path: str) -> Any:
    """Return the convolution at a path of a model, None if something else stands there."""
    try:
        module = model.get_submodule(path)
    except AttributeError:  # a parameter, or nothing
        return None
    return module if isinstance(module, _KINDS) else None


def kernel_shapes(convolution: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of A and B that PEFT gives to a convolution."""
    ones = (1,) * len(convolution.kernel_size)
    a = (rank, convolution.in_channels, *convolution.kernel_size)
    return a, (convolution.out_channels, rank // convolution.groups, *ones)


def otherwise_in_peft(convolution: Any) -> str:
    """Return the setting that PEFT's A has not, for which its output would differ; '' if none."""
    if any(d > 1 for d, k in zip(convolution.dilation, convolution.kernel_size, strict=True)
           if k > 1):  # fmt: skip
        return f"dilation={tuple(convolution.dilation)}"
    padded = convolution.padding == "same" or any(p not in (0, "valid") for p in _pads(convolution))
    if padded and convolution.padding_mode != "zeros":
        return f"padding_mode={convolution.padding_mode!r}"
    return ""


def _pads(convolution: Any) -> tuple[Any, ...]:
    pads = convolution.padding
    return (pads,) if isinstance(pads, str) else tuple(pads)


def require_convolution(adapter: Foreign, path: str, convolution: Any, rank: int) -> None:
    """Raise unless PEFT's update of a convolution has the positions of its output, and a rank.

    Raises:
        StoreError: A has none of the convolution's dilation or padding mode in PEFT, or the rank
            cannot be divided by its groups.
    """
    if setting := otherwise_in_peft(convolution):
        raise adapter.refuse(
            f"it updates {path}, a convolution with {setting}, and PEFT's update has none: its "
            "outputs belong to other positions. Train it anew here; save it in the own format."
        )
    if rank % convolution.groups:
        raise adapter.refuse(
            f"the rank of {path} is {rank}, which its {convolution.groups} groups do not divide."
        )


def kernels_here(convolution: Any, a: Tensor, b: Tensor, projects: bool) -> dict[str, Tensor]:
    """Return the tensors of the inserted module for PEFT's A and B of a convolution.

    Args:
        projects: whether the convolution is a projection here, which has dense factors.
    """
    own = b.flatten(1)  # (out, r / groups)
    if not projects:
        return {"a.weight": a, "b": own.T}
    if convolution.groups == 1:
        return {"a": a.flatten(1), "b": own.T}
    groups = convolution.groups
    dense: Tensor = torch.block_diag(*own.chunk(groups))  # type: ignore[no-untyped-call]
    return {"a": a.flatten(1), "b": dense.T}


def kernels_of(convolution: Any, path: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return PEFT's A and B for the factors of an inserted module.

    Args:
        a: (r, in) of a projection; else (r, in / groups, h, w), or (r, in, h, w) across groups.
        b: (out, r), or (out, r / groups) across groups.

    Raises:
        SpliceError: PEFT's A would lack the convolution's dilation or padding mode.
    """
    if setting := otherwise_in_peft(convolution):
        raise SpliceError(
            f"PEFT's format has no place for LoRA of {path}, a convolution with {setting}, which "
            "PEFT leaves out of its update. Save in the own format: leave format= out."
        )
    groups, size = convolution.groups, convolution.kernel_size
    b = b[(..., *[None] * len(size))].contiguous()
    if a.dim() == 2:
        a = a[(..., *[None] * len(size))]
    if groups == 1 or b.shape[1] * groups == len(a):  # PEFT's own
        return a.contiguous(), b
    if a.shape[1] == convolution.in_channels:  # a projection: each group has the whole A
        return a.repeat(groups, *[1] * (a.dim() - 1)), b
    width = convolution.in_channels // groups
    wide = a.new_zeros(groups, len(a), convolution.in_channels, *size)
    for group in range(groups):
        wide[group, :, group * width : (group + 1) * width] = a
    return wide.flatten(0, 1), b
