"""A selection's submodules: one object for all threads, which a removal reaches."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
from torch import nn

from surgery.host import selection
from surgery.host.selection import Selection
from surgery.host.variant import Children


def test_threads_that_ask_at_once_get_the_object_that_a_removal_reaches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = threading.Barrier(2)

    class Slow(Children):
        def __init__(self, host: nn.Module) -> None:
            super().__init__(host)
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(0.2)  # until the other thread makes one, too, if it does

    host, made = nn.Module(), Selection(())
    host.inserted = nn.Linear(1, 1)
    monkeypatch.setattr(selection, "Children", Slow)
    got: list[Any] = []
    threads = [threading.Thread(target=lambda: got.append(made.children_of(host))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    assert got[0] is got[1]
    made.retire(host)
    del host.inserted
    assert all(children.inserted is not None for children in got)
