"""Replace attributes of torch and transformers for a while, as seen by one thread.

A replacement is put into the attribute of the class or module, where every thread finds it. So
what is put there is a dispatcher: it calls the new function in the thread that asked for the
replacement, and the original in all others. One lock holds for all replacements: two threads that
replace the same attribute would otherwise restore each other's dispatcher.
"""

from __future__ import annotations

import inspect
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_MISSING = object()


# A host also holds this lock while it captures a variant, which replaces attributes inside: with a
# lock of its own, two threads could each hold one of the two and wait for the other.
patch_lock = threading.RLock()


@contextmanager
def patched(*replacements: tuple[Any, str, Callable[[Any], Any]]) -> Iterator[None]:
    """Set ``owner.name = make(original)`` for each ``(owner, name, make)``; restore it at the end.

    The calling thread sees the replacements, every other thread the originals.
    """
    me = threading.get_ident()
    saved: list[tuple[Any, str, Any]] = []
    with patch_lock:
        try:
            for owner, name, make in replacements:
                own = vars(owner).get(name, _MISSING)
                inherited = own is _MISSING and isinstance(owner, type)
                found = inspect.getattr_static(owner, name) if inherited else own
                bound = isinstance(found, (classmethod, types.ClassMethodDescriptorType))
                original = _of_class(found) if bound else getattr(owner, name)
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


def _of_class(method: Any) -> Callable[..., Any]:
    """Return a class method, of Python or of C, as a function whose first argument is the class."""
    if isinstance(method, classmethod):
        return method.__func__
    return lambda cls, *args, **kwargs: method.__get__(None, cls)(*args, **kwargs)


def _for_thread(thread: int, new: Callable[..., Any], old: Callable[..., Any]) -> Any:
    """Return a function that is ``new`` in the thread with that ident and ``old`` in others."""

    def chosen(*args: Any, **kwargs: Any) -> Any:
        function = new if threading.get_ident() == thread else old
        return function(*args, **kwargs)

    chosen.original = old  # type: ignore[attr-defined]
    return chosen


def unpatched(function: Any) -> Any:
    """Return the original of a replacement, and any other function itself.

    torch looks some functions up by name and so hands a replacement to ``__torch_function__``.
    """
    return getattr(function, "original", function)


# Replaces a library's choice of attention function: takes ``wrap(function) -> function``, returns
# replacements for ``patched``. For transformers it is ``huggingface.attention_patch``.
AttentionPatch = Callable[[Callable[[Callable[..., Any]], Callable[..., Any]]], list[Any]]
