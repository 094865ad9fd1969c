"""What is switched off belongs to a thread or task, and a repeated forward runs as it first did."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import surgery
from tests.support.models import build, checkpointing

IDS = torch.arange(14).reshape(2, 7) + 3
STATES = [(), ("a",), ("b",), ("a", "b")]


def two_adapters(name: str = "llama") -> Any:
    torch.manual_seed(0)
    model = build(name)
    for each in "ab":
        surgery.splice(model, surgery.method("lora", rank=2), name=each)
    surgery.freeze_base(model)
    with torch.no_grad():
        for _, parameter in surgery.spliced_parameters(model):
            parameter.normal_(0, 0.3)
    return model


def run(model: Any, off: tuple[str, ...], ids: Tensor = IDS) -> Tensor:
    """The logits without these adapters."""
    if not off:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits
    with surgery.disabled(model, off[0]):
        return run(model, off[1:], ids)


def test_each_thread_and_task_has_its_own_answer() -> None:
    model = two_adapters()
    expected = [run(model, off).detach() for off in STATES]
    wrong: list[Any] = []

    def work(off: tuple[str, ...], right: Tensor) -> None:
        outputs = [run(model, off) for _ in range(10)]
        wrong.extend(off for out in outputs if not torch.allclose(out, right, atol=1e-6))

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(STATES, expected, strict=True)
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong

    async def task(off: tuple[str, ...]) -> Tensor:
        if not off:
            await asyncio.sleep(0)
            return run(model, ())
        with surgery.disabled(model, off[0]):
            await asyncio.sleep(0)
            return await task(off[1:])

    async def every() -> list[Tensor]:
        return list(await asyncio.gather(*map(task, STATES)))

    for a, b in zip(asyncio.run(every()), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_blocks_that_overlap_in_time_leave_nothing_off() -> None:
    model = two_adapters()
    expected, inside, leave = run(model, ()), threading.Event(), threading.Event()

    def other() -> None:
        with surgery.disabled(model):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with surgery.disabled(model):
        thread.start()
        inside.wait()
    leave.set()
    thread.join()
    assert torch.equal(run(model, ()), expected)


@pytest.mark.parametrize("reentrant", [pytest.param(True, marks=pytest.mark.slow), False])
@given(st.lists(st.sampled_from(STATES[:3]), min_size=2, max_size=3), st.booleans())
@pytest.mark.few(1)
def test_forwards_of_one_step_keep_their_adapters_when_repeated(
    reentrant: bool, states: list[tuple[str, ...]], inside: bool
) -> None:
    model = two_adapters().train()

    def gradients() -> list[Tensor]:
        parts = [(i + 1) * run(model, off).square().mean() for i, off in enumerate(states)]
        parameters = [p for _, p in surgery.spliced_parameters(model)]
        for parameter in parameters:
            parameter.grad = None
        if inside:  # the backward pass runs in another state than any forward
            with surgery.disabled(model):
                sum(parts).backward()  # type: ignore[union-attr]
        else:
            sum(parts).backward()  # type: ignore[union-attr]
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]

    expected = gradients()
    checkpointing(model, reentrant)
    model.enable_input_require_grads()
    for a, b in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_switching_keeps_the_graphs_of_each_state() -> None:
    model = two_adapters()
    for off in STATES:
        run(model, off)
    before = {path: len(graphs) for path, graphs in surgery.variants(model).items()}
    for off in STATES * 2:
        run(model, off)
    assert {path: len(graphs) for path, graphs in surgery.variants(model).items()} == before
    surgery.refresh(model)
    assert not any(surgery.variants(model).values())
    run(model, ())
    assert all(surgery.variants(model).values())


def test_tasks_of_one_thread_that_overlap_leave_nothing_off_in_compiled_code() -> None:
    model, ids = two_adapters(), torch.arange(3, 9)[None]
    expected = run(model, (), ids)
    compiled = torch.compile(model, backend="eager")

    async def task(name: str, entered: asyncio.Event, leave: asyncio.Event) -> None:
        with surgery.using(model, name):
            entered.set()
            await leave.wait()

    async def every() -> None:
        events = [asyncio.Event() for _ in range(4)]
        first, second = list(surgery.splicer.reports(model))
        tasks = [
            asyncio.create_task(task(first, events[0], events[1])),
            asyncio.create_task(task(second, events[2], events[3])),
        ]
        await events[0].wait()
        await events[2].wait()
        for leave, each in zip(events[1::2], tasks, strict=True):  # the first leaves first
            leave.set()
            await each

    asyncio.run(every())
    torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, expected)
