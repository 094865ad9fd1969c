"""A selection's submodules: a removal reaches what every thread has."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
from torch import nn

from surgery.host import selection
from surgery.host.selection import Selection
from surgery.host.variant import Children


def test_a_removal_reaches_what_threads_got_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2)

    class Slow(Children):
        def __init__(self, host: nn.Module) -> None:
            super().__init__(host)
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(0.2)  # until the other thread makes one, too

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
    made.retire(host)
    del host.inserted
    assert len(got) == 2
    assert all(children.inserted is not None for children in got)
