"""Let signals such as Ctrl-C interrupt an operation only where an exception does no harm.

Python runs a signal's handler between any two instructions of the main thread: also while a context
manager puts back what it has replaced. In :func:`with_signals_delayed` handlers wait until the
operation calls :func:`deliver`, or until its end. It calls it once for each operation of torch that
it records, and for each module, host or weight.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
_came: list[tuple[int, Any]] = []
_handlers: dict[int, Callable[..., Any]] = {}  # of the signals that are delayed


def with_signals_delayed(function: Callable[[], T]) -> T:
    """Return ``function()``; signals wait meanwhile. They come to the main thread alone."""
    if _handlers or threading.current_thread() is not threading.main_thread():
        return function()
    known = {int(number): signal.getsignal(number) for number in signal.valid_signals()}
    try:
        try:
            _handlers.update({n: handler for n, handler in known.items() if callable(handler)})
            for number in _handlers:
                signal.signal(number, lambda *given: _came.append(given))
            return function()
        finally:
            _restore()
    finally:  # once more: a signal may have come between two handlers
        _restore()
        while _came:
            _handle(known)


def deliver() -> None:
    """Run the handlers of signals that have come since; they may raise."""
    while _came and threading.current_thread() is threading.main_thread():
        _handle(_handlers)


def _restore() -> None:
    while _handlers:
        number, handler = next(iter(_handlers.items()))
        signal.signal(number, handler)
        _handlers.pop(number, None)


def _handle(handlers: Any) -> None:
    number, frame = _came.pop(0)
    handlers[number](number, frame)
