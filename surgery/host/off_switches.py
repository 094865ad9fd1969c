"""Hold which splices are switched off: a property of the running context, not of the model.

Threads and tasks each have their own answer (``contextvars``), so one may run a model with an
adapter and another without it. A forward that gradient checkpointing runs again in the backward
pass gets the answer that its first run had.

Dynamo cannot read a context variable. The answer therefore stands a second time in a thread-local
variable, whose attributes Dynamo guards.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch

from surgery.interop import in_backward, keep, kept

_compiling = torch.compiler.is_dynamo_compiling


class Off(NamedTuple):
    """The splices that are off: ``(id of a host's state, name)``, and a short name for them."""

    pairs: frozenset[tuple[int, str]]
    key: str


NOTHING = Off(frozenset(), "")
_off: ContextVar[Off] = ContextVar("surgery_off", default=NOTHING)
_known: dict[frozenset[tuple[int, str]], Off] = {NOTHING.pairs: NOTHING}


class _Mirror(threading.local):
    def __init__(self) -> None:
        self.key = ""


_mirror = _Mirror()


def off_now() -> Off:
    """Return what is off in this context."""
    off = _off.get()
    if in_backward():
        return kept("off", off) or NOTHING
    if off.key:
        keep("off", off)
    return off


def off_key() -> str:
    """Return the short name of what is off in this context; ``""`` if nothing is."""
    return _mirror.key if _compiling() else off_now().key


@contextmanager
def switched_off(pairs: Iterable[tuple[int, str]]) -> Iterator[None]:
    """Switch these splices off, beside those that are off already, inside the ``with`` block."""
    every = off_now().pairs | frozenset(pairs)
    off = _known.setdefault(every, Off(every, f"off{len(_known)}"))
    token, before = _off.set(off), _mirror.key
    _mirror.key = off.key
    try:
        yield
    finally:
        _off.reset(token)
        _mirror.key = before
