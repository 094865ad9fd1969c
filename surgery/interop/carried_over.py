"""Whole parameters of which each process of a tensor-parallel plan computes with a part.

    forward     part = parameter[its share of one axis]
    backward    gradient = sum over the processes of the gradients of their parts

Every process keeps the whole parameter and gets its whole gradient, as a single process does. So a
parameter stays the object that it is, and an optimizer that has it trains it, when a plan is
applied after the splice. (A splice after the plan makes parts: divide_parameters.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Share(NamedTuple):
    """What a process computes with: ``length`` entries of an axis from ``start`` on, or all."""

    group: Any
    axis: int | None
    start: int
    length: int


class CarriedOver(nn.Parameter):
    """A whole parameter that modules read by ``own_part`` and ``sum_between``."""

    share: Share | None = None  # a copy has none, and is carried over anew


def carry_over(parameter: nn.Parameter, axis: int | None, mesh: Any) -> None:
    """Let each process compute with a part of a whole parameter.

    Args:
        axis: the axis that is divided, as ``torch.chunk`` divides it; None if none is.
    """
    group, size, rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()
    width = 0 if axis is None else parameter.shape[axis]
    each = -(-width // size)
    start = min(each * rank, width)
    divided: Any = parameter
    divided.__class__ = CarriedOver
    divided.share = Share(group, axis, start, min(each, width - start))


def give_back(parameter: nn.Parameter) -> None:
    """Let each process compute with the whole parameter again."""
    if is_carried_over(parameter):
        del parameter.share  # type: ignore[attr-defined]
        parameter.__class__ = nn.Parameter


def is_carried_over(parameter: Any) -> bool:
    """Whether each process computes with a part of this whole parameter, or all do with all."""
    return isinstance(parameter, CarriedOver) and parameter.share is not None


def part_of(parameter: CarriedOver) -> Tensor:
    """Return the part that this process computes with."""
    share = parameter.share
    if share is None or share.axis is None:
        return parameter.view_as(parameter)
    apply: Any = _Part.apply
    part: Tensor = apply(parameter, share)
    return part


def group_of(parameter: Any) -> Any:
    """Return the processes over which a parameter is divided; None if it is not."""
    share = parameter.share if isinstance(parameter, CarriedOver) else None
    return None if share is None or share.axis is None else share.group


@contextmanager
def read_whole(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let each process compute with whole parameters inside the ``with`` block."""
    held: list[tuple[Any, Any]] = [(p, p.share) for p in parameters if isinstance(p, CarriedOver)]
    try:
        for parameter, _ in held:
            parameter.__class__ = nn.Parameter
        yield
    finally:
        for parameter, share in held:
            parameter.__class__, parameter.share = CarriedOver, share


class _Part(torch.autograd.Function):
    """A part of a parameter; its gradient is the whole one, of all processes."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, share: Share) -> Tensor:
        ctx.share, ctx.shape = share, parameter.shape
        assert share.axis is not None
        return parameter.narrow(share.axis, share.start, share.length).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        share = ctx.share
        whole = gradients[0].new_zeros(ctx.shape)
        whole.narrow(share.axis, share.start, share.length).copy_(gradients[0])
        torch.distributed.all_reduce(whole, group=share.group)
        return whole, None
