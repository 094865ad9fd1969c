"""Many adapters in one model: what each further one costs, counted, and which graphs are made."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import surgery
from surgery.capture import forward

LIBRARY = str(Path(surgery.__file__).parent)
IDS = torch.arange(14).view(2, 7)
LAYERS = 2  # each has one host


def decoder() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=LAYERS, hidden_size=16, intermediate_size=32, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = decoder()
    surgery.splice(model, surgery.method("lora", rank=2))
    surgery.save(model, tmp_path)
    return tmp_path


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the hosts that are captured, one entry for each run of a forward."""
    paths: list[str] = []
    record = forward._record

    def noted(*given: Any) -> Any:
        paths.append(given[-1])
        return record(*given)

    monkeypatch.setattr(forward, "_record", noted)
    return paths


@contextmanager
def counted(into: list[int]) -> Iterator[None]:
    """Put into the list how many functions of the library run inside."""
    count = 0

    def on_event(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(LIBRARY)

    before = sys.getprofile()
    sys.setprofile(on_event)
    try:
        yield
    finally:
        sys.setprofile(before)
    into.append(count)


def test_each_adapter_adds_at_most_four_per_cent_of_a_load_to_the_next(saved: Path) -> None:
    model, counts = decoder(), list[int]()
    for i in range(8):
        with counted(counts):
            surgery.load(model, saved, name=f"a{i}")
    steps = [after - before for before, after in itertools.pairwise(counts[1:])]
    assert max(steps) <= 0.04 * counts[1]
    assert max(steps) <= 1.1 * min(steps)


def test_a_load_captures_each_host_once_however_many_adapters_there_are(
    saved: Path, captures: list[str]
) -> None:
    model = decoder()
    for i in range(5):
        surgery.load(model, saved, name=f"a{i}")
        assert len(captures) == len(set(captures)) == LAYERS
        captures.clear()


def test_a_graph_is_made_for_the_choice_that_runs_and_for_no_other(
    saved: Path, captures: list[str]
) -> None:
    model = decoder()
    for i in range(4):
        surgery.load(model, saved, name=f"a{i}")
    captures.clear()
    for name in ("a1", "a3", "a1", "a3"):
        surgery.use(model, name)
        model(IDS)
        model(IDS)
    assert len(captures) == 2 * LAYERS  # of two choices; the others have none
