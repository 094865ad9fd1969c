"""Many save to one folder, others read it, some are killed: there is one whole adapter."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery.adapter.reading import read
from tests.support.models import build
from tests.support.splices import built_with

FORK = multiprocessing.get_context("fork")


def spliced(value: float) -> Any:
    """A model whose inserted parameters all have one value, by which its adapter is known."""
    model = built_with("gpt2", surgery.method("lora", rank=2))
    with torch.no_grad():
        for _, parameter in surgery.spliced_parameters(model):
            parameter.fill_(value)
    return model


def value_in(folder: Path) -> float:
    """The one value of the adapter in a folder; its tensors come from one save."""
    _, tensors = read(folder)
    values = {x for tensor in tensors.values() for x in tensor.flatten().tolist()}
    assert len(values) == 1
    return values.pop()


def is_tidy(folder: Path) -> bool:
    description, _ = read(folder)
    return sorted(p.name for p in folder.iterdir()) == sorted(
        ["surgery.json", description["tensors"]]
    )


def save_often(models: list[Any], folder: Path, times: int) -> None:
    """Save each model in a thread of its own."""
    warnings.simplefilter("ignore")  # of another save that was under way
    torch.set_num_threads(1)

    def often(model: Any) -> None:
        for _ in range(times):
            surgery.save(model, folder)

    threads = [threading.Thread(target=often, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.slow
def test_two_hundred_saves_at_once_leave_one_whole_adapter(tmp_path: Path) -> None:
    """Two processes with two threads each save, two threads read all the while."""
    models = [spliced(float(n)) for n in range(4)]
    folder = surgery.save(models[0], tmp_path / "adapter")
    savers = [
        FORK.Process(target=save_often, args=(pair, folder, 50))
        for pair in (models[:2], models[2:])
    ]
    found: list[list[float]] = [[], []]

    def reads(values: list[float]) -> None:
        while any(saver.is_alive() for saver in savers):
            values.append(value_in(folder))

    readers = [threading.Thread(target=reads, args=(values,)) for values in found]
    for each in (*savers, *readers):
        each.start()
    for each in (*savers, *readers):
        each.join()
    assert [saver.exitcode for saver in savers] == [0, 0]
    assert min(map(len, found)) > 50
    assert {*found[0], *found[1]} <= {0.0, 1.0, 2.0, 3.0}
    assert is_tidy(folder)
    surgery.load(build("gpt2"), folder)


@pytest.mark.slow
def test_a_hundred_killed_saves_leave_a_whole_adapter_and_nothing_for_the_next(
    tmp_path: Path,
) -> None:
    one, two, three = spliced(1.0), spliced(2.0), spliced(3.0)
    folder = surgery.save(three, tmp_path / "adapter")
    rng, moments = random.Random(0), 0
    for _ in range(100):
        saver = FORK.Process(target=save_often, args=([one, two], folder, 100))
        saver.start()
        time.sleep(rng.uniform(0.02, 0.3))
        assert saver.pid is not None
        os.kill(saver.pid, signal.SIGKILL)
        saver.join()
        assert saver.exitcode == -signal.SIGKILL
        moments += value_in(folder) in (1.0, 2.0)
        surgery.save(three, folder)
        assert value_in(folder) == 3.0
        assert is_tidy(folder)
    assert moments > 50  # else they were killed before they saved
