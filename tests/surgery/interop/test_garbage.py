"""Operations let the collector of garbage run rarely, and leave it as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import surgery
from surgery.interop import exclusively


@pytest.fixture(autouse=True)
def thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    try:
        yield
    finally:
        gc.set_threshold(*before)


class Reads(nn.Module):
    """A layer that notes the thresholds of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        SEEN.append(gc.get_threshold()[0])
        return torch.as_tensor(self.linear(x))


SEEN: list[int] = []


def test_the_collector_runs_rarely_in_a_splice_and_as_before_after_it() -> None:
    SEEN.clear()
    model = Reads()
    surgery.splice(model, surgery.method("lora", rank=2), example_inputs=torch.ones(2, 3, 4))
    assert min(SEEN) == 50_000
    assert gc.get_threshold() == (700, 10, 10)


def test_an_operation_that_raises_leaves_the_collector_as_it_was() -> None:
    with pytest.raises(ZeroDivisionError):
        exclusively(lambda: exclusively(lambda: 1 // 0))
    assert gc.get_threshold() == (700, 10, 10)


def test_a_collector_that_is_off_stays_off() -> None:
    gc.set_threshold(0)
    assert exclusively(gc.get_threshold)[0] == 0
    assert gc.get_threshold()[0] == 0


def test_thresholds_that_are_set_meanwhile_stay() -> None:
    exclusively(lambda: gc.set_threshold(900, 5, 5))
    assert gc.get_threshold() == (900, 5, 5)
