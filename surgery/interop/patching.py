"""Replace attributes of torch and transformers for a while, as seen by one thread.

A replacement is put into the attribute of the class or module, where every thread finds it. So
what is put there is a dispatcher: it calls the new function in the thread that asked for the
replacement, and the original in all others. One lock holds for all replacements: two threads that
replace the same attribute would otherwise restore each other's dispatcher. Who replaces runs inside
:func:`exclusively`, which holds it.

Nothing stays replaced, and the lock is not kept:

    an exception at any line    each attribute is noted before it is replaced; putting back goes on
                                where it was interrupted. A context manager of Python may not run
                                its end at all, so ``exclusively`` is none, and ends the rest
                                thread_state.py does the same for what is kept for each thread
    a fork in another thread    waits for the lock, so the child inherits the originals
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from surgery.interop.garbage import collecting_rarely
from surgery.interop.interrupts import with_signals_delayed
from surgery.interop.thread_state import keeping_thread_state

T = TypeVar("T")
_MISSING = object()
_REPLACES = "_surgery_replaces"


_lock = threading.RLock()


def exclusively(function: Callable[[], T]) -> T:
    """Return ``function()``, which replaces attributes or changes a model, alone in the process.

    Other threads wait, and signals do until ``function`` delivers them. What it has replaced, and
    an exception has kept it from putting back, is put back.
    """
    held, known = False, 0
    try:
        try:
            held = _lock.acquire()
            known = len(_sessions)
            operate = functools.partial(collecting_rarely, function)
            return keeping_thread_state(with_signals_delayed)(operate)
        finally:
            if held:
                _put_back_beyond(known)
                held = bool(_lock.release())  # type: ignore[func-returns-value]  # in one line
    finally:  # once more: an exception may have come in the lines above
        if held:
            _put_back_beyond(known)
            held = bool(_lock.release())  # type: ignore[func-returns-value]


class _Session:
    """One use of :func:`patched`.

    Attributes:
        thread: the thread that sees the replacements; 0 once they are being put back.
        saved: what is to be put back: (owner, name, its own value or _MISSING).
    """

    def __init__(self, thread: int) -> None:
        self.thread = thread
        self.saved: list[tuple[Any, str, Any]] = []

    def put_back(self) -> None:
        """Put every attribute back; called again after an interrupt, go on."""
        self.thread = 0
        while self.saved:
            owner, name, own = self.saved[-1]
            if own is not _MISSING:
                setattr(owner, name, own)
            elif name in vars(owner):
                delattr(owner, name)
            self.saved.pop()


_sessions: list[_Session] = []  # those under way, the innermost last


class OwnValue:
    """An attribute of some objects of a class that has another value in one thread.

    Given to :func:`patched` in place of a function, with the class as owner. All other threads, and
    all other objects, see what the objects hold themselves.
    """

    def __init__(self, objects: Iterable[Any], value: Any) -> None:
        self.objects = {id(each): each for each in objects}  # alive, so that ids stay unique
        self.value = value

    def put(self, session: _Session, owner: type, name: str) -> None:
        """Become the class's attribute."""
        self.session, self.name = session, name
        self.before = vars(owner).get(name)
        session.saved.append((owner, name, vars(owner).get(name, _MISSING)))
        setattr(owner, name, self)

    def __get__(self, instance: Any, kind: type | None = None) -> Any:
        if instance is None:
            raise AttributeError(f"type object {kind} has no attribute {self.name!r}")
        if threading.get_ident() == self.session.thread and id(instance) in self.objects:
            return self.value
        if self.before is not None:
            return self.before.__get__(instance, kind)
        try:
            return vars(instance)[self.name]
        except KeyError:
            raise AttributeError(self.name) from None

    def __set__(self, instance: Any, value: Any) -> None:
        vars(instance)[self.name] = value

    def __delete__(self, instance: Any) -> None:
        del vars(instance)[self.name]


@contextmanager
def patched(*replacements: tuple[Any, str, Callable[[Any], Any] | OwnValue]) -> Iterator[None]:
    """Set ``owner.name = make(original)`` for each ``(owner, name, make)``; restore it at the end.

    The calling thread sees the replacements, every other thread the originals. It is inside
    :func:`exclusively`. ``make`` may be an :class:`OwnValue`, for an attribute that is not called.
    """
    session = _Session(threading.get_ident())
    try:
        try:
            _sessions.append(session)
            for owner, name, make in replacements:
                _replace(session, owner, name, make)
            yield
        finally:
            _end(session)
    finally:  # once more: an interrupt may have fallen into the lines above
        _end(session)


def _replace(session: _Session, owner: Any, name: str, make: Any) -> None:
    """Replace one attribute, noted first."""
    if isinstance(make, OwnValue):
        make.put(session, owner, name)
        return
    own = vars(owner).get(name, _MISSING)
    inherited = own is _MISSING and isinstance(owner, type)
    found = inspect.getattr_static(owner, name) if inherited else own
    bound = isinstance(found, (classmethod, types.ClassMethodDescriptorType))
    original = _of_class(found) if bound else getattr(owner, name)
    new = _for_session(session, make(original), original)
    session.saved.append((owner, name, own))
    setattr(owner, name, classmethod(new) if bound else new)


def _end(session: _Session) -> None:
    """Put back what a session has replaced, and before it what later ones have left."""
    if session in _sessions:
        _put_back_beyond(_sessions.index(session))


def _put_back_beyond(known: int) -> None:
    """Put back what the sessions after the first ``known`` have replaced, the last one first."""
    while len(_sessions) > known:
        _sessions[-1].put_back()
        _sessions.pop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_lock.acquire,
        after_in_parent=_lock.release,
        after_in_child=_lock.release,
    )


def _of_class(method: Any) -> Callable[..., Any]:
    """Return a class method, of Python or of C, as a function whose first argument is the class."""
    if isinstance(method, classmethod):
        return method.__func__
    return lambda cls, *args, **kwargs: method.__get__(None, cls)(*args, **kwargs)


def _for_session(session: _Session, new: Callable[..., Any], old: Callable[..., Any]) -> Any:
    """Return a function that is ``new`` in the thread of the session and ``old`` in others."""

    def chosen(*args: Any, **kwargs: Any) -> Any:
        function = new if threading.get_ident() == session.thread else old
        return function(*args, **kwargs)

    vars(chosen)[_REPLACES] = old
    return chosen


def unpatched(function: Any) -> Any:
    """Return the original of a replacement, and anything else itself.

    torch looks some functions up by name and so hands a replacement to ``__torch_function__``.
    """
    kinds = types.FunctionType, types.MethodType  # others may answer to any name, as torch.ops does
    return getattr(function, _REPLACES, function) if type(function) in kinds else function


# Replaces a library's choice of attention function: takes ``wrap(function) -> function``, returns
# replacements for ``patched``. For transformers it is ``huggingface.attention_patch``.
AttentionPatch = Callable[[Callable[[Callable[..., Any]], Callable[..., Any]]], list[Any]]
