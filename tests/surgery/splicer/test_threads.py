"""A model is spliced while other threads run it: they see it as it was, or as it is afterwards."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.testing import make_model
from tests.support.methods import default
from tests.support.models import perturb

IDS = torch.arange(3, 13).reshape(2, 5)


@pytest.fixture(autouse=True)
def _quick_turns() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


class Shift(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


class Nothing(nn.Module):
    def forward(self, x: Tensor, onto: Tensor) -> Tensor:
        return onto


class Declared(surgery.Method):
    """Says that it starts at the base, and does not."""

    name = "declared"

    def splice(self, site: surgery.OpenSite) -> None:
        site.port("output").insert(Shift(site.width), name="declared")


def spliced() -> Any:
    model = make_model("fused")
    surgery.splice(model, surgery.method("lora"))
    perturb(model)
    return model


@torch.no_grad()
def test_a_thread_that_runs_the_model_sees_no_splice_under_way() -> None:
    model, found, stop = spliced(), [], threading.Event()
    expected = model(input_ids=IDS).logits

    @torch.no_grad()
    def serve() -> None:
        while not stop.is_set():
            try:
                found.append(torch.equal(model(input_ids=IDS).logits, expected))
            except Exception as error:
                found.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    for _ in range(4):
        surgery.splice(model, surgery.method("ffn_adapter", rank=4), name="second")
        surgery.remove(model, "second")
        with pytest.raises(surgery.SpliceError, match="declares start 'exact'"):
            surgery.splice(model, Declared(), name="second")
    stop.set()
    thread.join()
    assert len(found) > 1
    assert [each for each in found if each is not True] == []


def switching(method: surgery.Method, forwards: int) -> list[Any]:
    """What four threads found that each ran and switched one model, while a splice came and went.

    Returns:
        for each forward True, or what was wrong with it.
    """
    model: Any = make_model("fused")
    with torch.no_grad():
        base = model(input_ids=IDS).logits
        surgery.splice(model, method)
        perturb(model)
        on = model(input_ids=IDS).logits
    found: list[Any] = []

    @torch.no_grad()
    def serve(number: int) -> None:
        for turn in range(forwards):
            try:
                if (number + turn) % 2:
                    good = torch.allclose(model(input_ids=IDS).logits, on, atol=1e-5)
                else:
                    with surgery.disabled(model):
                        good = torch.allclose(model(input_ids=IDS).logits, base, atol=1e-5)
                found.append(good or f"other numbers in forward {turn} of thread {number}")
            except Exception as error:
                found.append(error)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(8):
        surgery.splice(model, surgery.method("bitfit"), name="second")
        surgery.remove(model, "second")
    for thread in threads:
        thread.join()
    return found


SWITCHED = sorted(set(surgery.methods()) - {"red"})


def test_threads_switch_one_model_apart() -> None:
    found = switching(surgery.method("lora"), 10)
    assert len(found) == 40
    assert [each for each in found if each is not True] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SWITCHED)
def test_a_thousand_forwards_of_four_threads_are_right(name: str) -> None:
    found = switching(default(name), 250)
    assert len(found) == 1000
    assert [each for each in found if each is not True] == []


@torch.no_grad()
def test_a_refused_splice_leaves_the_graphs_and_what_is_on() -> None:
    model = spliced()
    expected = model(input_ids=IDS).logits
    before = {path: [id(v) for v in graphs] for path, graphs in surgery.variants(model).items()}
    with pytest.raises(surgery.SpliceError, match="declares start 'exact'"):
        surgery.splice(model, Declared(), name="second")
    after = {path: [id(v) for v in graphs] for path, graphs in surgery.variants(model).items()}
    assert after == before
    assert torch.equal(model(input_ids=IDS).logits, expected)
    for block in model.modules():  # a submodule that is replaced afterwards is the one that runs
        if hasattr(block, "lora_value"):
            block.lora_value = Nothing()
    assert not torch.equal(model(input_ids=IDS).logits, expected)
