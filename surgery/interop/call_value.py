"""Hold what one module tells the modules below it while a call runs.

A value belongs to one thread and ends with the call. A forward that gradient checkpointing repeats
in the backward pass, when the call has ended, gets the value of its first run.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

from surgery.interop.checkpointing import keep, kept

Value = TypeVar("Value")


class CallValue(threading.local, Generic[Value]):
    """A value that a wrapping module sets and the modules inside it read, during one call.

    Keep it as an attribute of a module. Threads that share the module don't see each other's
    values, and copies and pickles of the module start without one.

    Example:
        >>> length = surgery.CallValue[int]()
        >>> with length.set(3):
        ...     length.get()
        3
        >>> length.get() is None
        True
    """

    def __init__(self) -> None:
        self._value: Value | None = None
        self._repeats = False  # whether a backward pass may repeat it

    @contextmanager
    def set(self, value: Value) -> Iterator[None]:
        """Give the value to whatever runs inside the ``with`` block."""
        before = self._value, self._repeats
        self._value, self._repeats = value, torch.is_grad_enabled()
        try:
            yield
        finally:
            self._value, self._repeats = before

    def get(self) -> Value | None:
        """Return the value of the call that runs; None outside of one."""
        if torch.compiler.is_compiling():
            return self._value
        if self._value is None:
            found: Value | None = kept(self, None)
            return found
        if self._repeats:
            keep(self, self._value)
        return self._value

    def __reduce__(self) -> Any:
        return type(self), ()

    def __deepcopy__(self, memo: dict[int, Any]) -> CallValue[Value]:
        return type(self)()
