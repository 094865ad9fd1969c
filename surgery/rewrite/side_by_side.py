"""Lay the factors of several modules side by side in memory, so that their stack is a view.

lay_side_by_side      once: move parameters into one piece of memory
side_by_side          the stack of tensors, a view where they lie so; a copy elsewhere
KeptStack             the same for the factors of one node, which is asked at each decoded token
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from surgery.attention import transformed


def only_plain_operators() -> bool:
    """Whether only torch's own operators can be used now, and no pointer can be asked for."""
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return torch.compiler.is_compiling() or forward_mode or transformed()


def side_by_side(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Return the concatenation of tensors along an axis; a view where they lie so in memory."""
    first = parts[0]
    if len(parts) == 1:
        return first
    found = None if only_plain_operators() else _as_view(parts, dim)
    return torch.cat(list(parts), dim) if found is None else found


def _as_view(parts: Sequence[Tensor], dim: int) -> Tensor | None:
    """Return the stack of tensors that lie side by side in memory; None of others."""
    first = parts[0]
    if any(type(p) not in (Tensor, nn.Parameter) for p in parts):
        return None
    offset = first.storage_offset()
    storage = first.untyped_storage().data_ptr()
    stride, size = first.stride(), list(first.shape)
    size[dim] = 0
    for part in parts:
        if (
            part.storage_offset() != offset + size[dim] * stride[dim]
            or part.stride() != stride
            or part.dtype != first.dtype
            or part.untyped_storage().data_ptr() != storage
            or storage == 0
        ):
            return None
        size[dim] += part.shape[dim]
    return first.detach().as_strided(size, stride)


class KeptStack:
    """The stack of factors that lie side by side, kept while they lie where they lay.

    To ask for a place in memory takes a tenth of the time that it takes to describe a view of it.
    The kept view holds its memory, so no other tensor can come to lie there meanwhile.
    """

    def __init__(self) -> None:
        self._kept: tuple[Tensor, list[tuple[Tensor, int, torch.Size]]] | None = None

    def of(self, factors: Sequence[Tensor]) -> Tensor:
        """Return the factors (r_i, d) as one (sum r_i, d)."""
        if len(factors) == 1:
            return factors[0]
        if self._kept is not None and len(factors) == len(self._kept[1]):
            whole, known = self._kept
            for factor, (same, place, shape) in zip(factors, known, strict=True):
                if (
                    factor is not same
                    or factor.data_ptr() != place
                    or factor.shape != shape
                    or not factor.is_contiguous()
                    or factor.dtype is not whole.dtype
                ):
                    break
            else:
                return whole
        made = _as_view(factors, 0)
        if made is None or not all(factor.is_contiguous() for factor in factors):
            self._kept = None
            return torch.cat(list(factors)) if made is None else made
        self._kept = made, [(factor, factor.data_ptr(), factor.shape) for factor in factors]
        return made


def lay_side_by_side(factors: Sequence[Tensor]) -> None:
    """Move parameters into one piece of memory, if each has its memory for itself.

    Their values, and the objects that they are, stay. Parameters that another library keeps in
    memory of its own, flattened or sharded, are left where they are.
    """
    if len(factors) < 2:
        return
    first = factors[0]
    alike = all(
        type(a) is nn.Parameter
        and not a.is_meta
        and a.is_contiguous()
        and (a.dtype, a.device, a.shape[1:]) == (first.dtype, first.device, first.shape[1:])
        and a.untyped_storage().nbytes() == a.numel() * a.element_size()
        for a in factors
    )
    if not alike:
        return
    with torch.no_grad(), torch.inference_mode(False):
        whole = torch.cat([a.detach() for a in factors])
        for a, part in zip(factors, torch.split(whole, [a.shape[0] for a in factors]), strict=True):
            a.data = part
