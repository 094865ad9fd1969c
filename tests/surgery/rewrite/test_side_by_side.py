"""Factors that lie side by side: their stack is a view, and is never another than they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from surgery.rewrite.side_by_side import KeptStack, lay_side_by_side, side_by_side


def test_parameters_in_memory_of_another_library_stay_there() -> None:
    flat = torch.randn(12)
    parameters = [nn.Parameter(flat[:6].view(2, 3)), nn.Parameter(torch.randn(2, 3))]
    lay_side_by_side(parameters)
    flat.zero_()
    assert torch.equal(parameters[0], torch.zeros(2, 3))
    lay_side_by_side([])
    apart = torch.randn(2, 8).split(4, -1)
    assert torch.equal(side_by_side(apart, -1), torch.cat(apart, -1))
    assert torch.equal(side_by_side(apart, 0), torch.cat(apart, 0))
    assert torch.equal(side_by_side(apart[::-1], -1), torch.cat(apart[::-1], -1))


def _swap(a: nn.Parameter) -> None:
    a.data = torch.randn_like(a)


def _transpose(a: nn.Parameter) -> None:
    a.data = a.data.T if a.shape[0] == a.shape[1] else a.data.flip(0)


def _write(a: nn.Parameter) -> None:
    a.data.add_(1)


def _move(a: nn.Parameter) -> None:
    a.data = a.data.double()


CHANGES: dict[str, Callable[[nn.Parameter], None]] = {
    "swap": _swap, "transpose": _transpose, "write": _write,
}  # fmt: skip


@given(
    st.lists(st.tuples(st.sampled_from([*CHANGES, "move", "free"]), st.integers(0, 2)), max_size=6)
)
@torch.no_grad()
def test_a_kept_stack_is_what_its_factors_are(changes: list[tuple[str, int]]) -> None:
    factors = [nn.Parameter(torch.randn(rank, 3)) for rank in (3, 2, 3)]
    lay_side_by_side(factors)
    stack = KeptStack()
    kept = stack.of(factors)
    assert stack.of(factors) is kept
    for name, which in changes:
        if name == "move":
            for factor in factors:  # of several dtypes there is no stack
                _move(factor)
        elif name == "free":
            freed = factors[which].untyped_storage().data_ptr()
            together = [f for f in factors if f.untyped_storage().data_ptr() == freed]
            held = [f.data.clone() for f in together]
            factors[which].untyped_storage().resize_(0)
            for factor, value in zip(together, held, strict=True):
                factor.data = value
        else:
            CHANGES[name](factors[which])
        assert torch.equal(stack.of(factors), torch.cat([f.detach() for f in factors]))
        assert torch.equal(stack.of(factors[::-1]), torch.cat([f.detach() for f in factors[::-1]]))


def test_a_kept_stack_is_for_the_factors_that_are_asked() -> None:
    factors = [nn.Parameter(torch.randn(2, 3)) for _ in range(3)]
    lay_side_by_side(factors)
    stack = KeptStack()
    with torch.no_grad():
        stack.of(factors)
        assert torch.equal(stack.of(factors[:2]), torch.cat(factors[:2]))
        other = [nn.Parameter(f.detach().clone()) for f in factors]
        other[0].add_(1)
        assert torch.equal(stack.of(other), torch.cat(other))
