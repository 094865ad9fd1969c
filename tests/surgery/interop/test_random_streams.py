"""A splice in one thread leaves what other threads see and draw as it is."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

import surgery
from surgery.interop import draw_anew, silenced
from tests.support.models import build, inputs


@contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Call ``act`` again and again in another thread."""
    stop, failed = threading.Event(), []
    before = sys.getswitchinterval()

    def loop() -> None:
        while not stop.is_set():
            try:
                act()
            except Exception as error:
                failed.append(error)
                return

    thread = threading.Thread(target=loop)
    sys.setswitchinterval(1e-4)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(before)
    assert not failed


@pytest.mark.parametrize("name", ["lora", "inducer"])
def test_other_threads_draw_each_number_once_and_see_no_evaluation_mode(name: str) -> None:
    model = build("gpt2").train()
    modules, parameters = list(model.modules()), list(model.parameters())
    drawn: list[float] = []
    seen: set[tuple[bool, bool]] = set()

    def draw() -> None:
        drawn.append(float(torch.rand((), dtype=torch.float64)))
        drawn.append(random.random())
        training = all(module.training for module in modules)
        seen.add((training, all(p.requires_grad for p in parameters)))

    with meanwhile(draw):
        for _ in range(2):
            surgery.splice(model, surgery.method(name), example_inputs=inputs("gpt2"))
            surgery.remove(model)
    assert len(drawn) > 100
    assert len(set(drawn)) == len(drawn)
    assert seen == {(True, True)}


def test_own_streams_draw_the_same_each_time() -> None:
    model, waiting = torch.nn.Dropout(), threading.Event()
    thread = threading.Thread(target=waiting.wait)
    thread.start()
    try:
        before, python = torch.random.get_rng_state(), random.getstate()
        with silenced(model):
            draws = []
            for _ in range(2):
                draw_anew()
                draws.append((torch.rand(3), torch.randint(9, (4,)), torch.empty(3).normal_()))
                draws[-1] += (model(torch.ones(50)),)
                random.random()
        assert all(map(torch.equal, *draws))
        assert not torch.equal(draws[0][0], torch.zeros(3))
        assert torch.equal(torch.random.get_rng_state(), before)
        assert random.getstate() == python
    finally:
        waiting.set()
        thread.join()
