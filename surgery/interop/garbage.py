"""Collect garbage rarely while an operation runs.

An operation makes a hundred thousand small objects, the nodes of its graphs, and nearly all of them
live on. Each collection looks at them again, and the large ones at all objects of the process.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_NEW_OBJECTS = 50_000  # between two collections
_changed: list[tuple[tuple[int, int, int], tuple[int, int, int]]] = []  # before, meanwhile


def collecting_rarely(function: Callable[[], T]) -> T:
    """Return ``function()``, which runs alone in the process (:func:`exclusively`).

    The thresholds are those of the process, so they hold for its other threads meanwhile. A
    collector that is off stays off.
    """
    if _changed:
        return function()
    try:
        try:
            new, young, old = gc.get_threshold()
            rarely = new and max(new, _NEW_OBJECTS)
            _changed.append(((new, young, old), (rarely, young, old)))
            gc.set_threshold(*_changed[0][1])
            return function()
        finally:
            _restore()
    finally:  # once more: an exception may have come in the lines above
        _restore()


def _restore() -> None:
    """Give the collector its thresholds back, unless the user has set others meanwhile."""
    for before, meanwhile in _changed:
        if gc.get_threshold() == meanwhile:
            gc.set_threshold(*before)
    _changed.clear()
