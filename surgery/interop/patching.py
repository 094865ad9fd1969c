"""Temporary replacement of attributes, for the time of a capture and in one thread only."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_MISSING = object()


one_at_a_time = threading.RLock()  # captures and splices, too: two locks could wait for each other


@contextmanager
def patched(*replacements: tuple[Any, str, Callable[[Any], Any]]) -> Iterator[None]:
    """Set ``owner.name = make(original)`` for each ``(owner, name, make)``; undo it at the end.

    The replacements are seen by the calling thread alone: every other one gets the originals.
    """
    me = threading.get_ident()
    saved: list[tuple[Any, str, Any]] = []
    with one_at_a_time:
        try:
            for owner, name, make in replacements:
                own = vars(owner).get(name, _MISSING)
                bound = isinstance(own, classmethod)
                original = own.__func__ if isinstance(own, classmethod) else getattr(owner, name)
                saved.append((owner, name, own))
                new = _for_thread(me, make(original), original)
                setattr(owner, name, classmethod(new) if bound else new)
            yield
        finally:
            for owner, name, own in reversed(saved):
                if own is _MISSING:
                    delattr(owner, name)
                else:
                    setattr(owner, name, own)


def _for_thread(thread: int, new: Callable[..., Any], old: Callable[..., Any]) -> Any:
    def chosen(*args: Any, **kwargs: Any) -> Any:
        function = new if threading.get_ident() == thread else old
        return function(*args, **kwargs)

    chosen.original = old  # type: ignore[attr-defined]
    return chosen


def unpatched(function: Any) -> Any:
    """The function itself, where torch looked it up by name and found a replacement."""
    return getattr(function, "original", function)


# Something that replaces the choice of attention function: takes ``wrap(function) -> function``,
# gives replacements for ``patched``. interop/huggingface.py has one for transformers' registry.
AttentionPatch = Callable[[Callable[[Callable[..., Any]], Callable[..., Any]]], list[Any]]
