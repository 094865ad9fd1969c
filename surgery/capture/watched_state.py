"""Watch a forward while it is captured: what it reads from Python's state, and what it changes.

    sys.settrace         each function that starts: the globals that its code names, what its
                         closure holds
    __getattribute__     of modules, and of every object that a read has reached: the attribute
    __getattr__          of modules: the child, parameter or buffer
    __setattr__          what the attribute was before (side_effects.py undoes the change)

What is reached is looked into: functions that ran are read with their closures and defaults, lists
and dicts with their items. Code of torch and of Python's own library is not watched, and neither
are forwards that run for their value alone (``Tracer.executing``).
"""

from __future__ import annotations

import functools
import gc
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from typing import Any

from torch import Tensor, nn

from surgery.capture.proxy import is_proxy
from surgery.capture.python_code import global_names, is_watched, looks_closely, of_a_library
from surgery.capture.reads import MISSING, Read, TensorKind, contents, is_container
from surgery.interop import patched, unpatched

_OF_MODULES = frozenset(vars(nn.Module())) - {"training", "_modules", "_parameters", "_buffers"}
_LEAVES = (bool, int, float, str, Enum, Tensor, nn.Module, type, types.ModuleType)
_MEMBERS = (types.MemberDescriptorType, types.GetSetDescriptorType)


@contextmanager
def _collections_noted(collecting: list[bool]) -> Iterator[None]:
    """Keep an entry in the list while this thread collects garbage.

    Finalizers and callbacks that run then are no part of the forward.
    """
    me = threading.get_ident()

    def begin(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and threading.get_ident() == me:
            collecting[:] = [True]

    def end(phase: str, info: dict[str, int]) -> None:
        if phase == "stop" and threading.get_ident() == me:
            collecting.clear()

    try:
        gc.callbacks.insert(0, begin)  # the first, and the last: others' callbacks are in between
        gc.callbacks.append(end)
        yield
    finally:
        gc.callbacks[:] = [each for each in gc.callbacks if each not in (begin, end)]


class Watcher:
    """What one forward has read and changed.

    Attributes:
        reads: every answer, once.
        tensors: where a tensor was read: ``(owner, name)`` by its id.
        changes: what the forward has set: ``(owner, place, name, value before)``; the place is
            the dictionary that holds the attribute.
    """

    def __init__(self, is_executing: Callable[[], bool]) -> None:
        self.is_executing = is_executing
        self.reads: dict[tuple[str, int, Any], Read] = {}
        self.tensors: dict[int, tuple[Any, str]] = {}
        self.changes: list[tuple[Any, dict[str, Any], str, Any]] = []
        self._changed: set[tuple[int, str]] = set()
        self._started: dict[int, types.CodeType] = {}
        self._ran: set[int] = set()  # those of them that are no library's
        self._inner: set[int] = set()  # code of functions that started functions define
        self._functions: dict[int, types.FunctionType] = {}
        self._reached: dict[int, Any] = {}  # alive, so that ids stay unique
        self._classes: set[type] = set()
        self.looks_closely = False  # some code that ran may tell a proxy from its value
        self._patches = ExitStack()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what runs inside the ``with`` block."""
        before = sys.gettrace()
        collecting: list[bool] = []  # while it has an entry, finalizers run in this thread

        def on_call(frame: types.FrameType, event: Any, argument: Any) -> Any:
            if event == "call" and not collecting and not self.is_executing():
                self._start(frame)
            return before(frame, event, argument) if before is not None else None

        replacements: list[Any] = [
            (nn.Module, "__getattribute__", self._noted),
            (nn.Module, "__getattr__", self._noted_child),
            (nn.Module, "__setattr__", self._noted_set),
        ]
        with self._patches, patched(*replacements), _collections_noted(collecting):
            try:
                sys.settrace(on_call)
                yield
            finally:
                sys.settrace(before)

    def finish(self) -> list[Read]:
        """Return the reads, with the closures and defaults of the functions that ran."""
        asked: set[int] = set()
        while left := [f for key, f in self._functions.items() if key not in asked]:
            for function in left:
                asked.add(id(function))
                if id(function.__code__) not in self._ran:
                    continue
                for name in ("__code__", "__defaults__", "__kwdefaults__"):
                    self.add("attribute", function, name, getattr(function, name))
                    self.look_into(getattr(function, name))
                for cell in function.__closure__ or ():
                    try:
                        held = cell.cell_contents
                    except ValueError:
                        continue
                    self.add("attribute", cell, "cell_contents", held)
                    self.look_into(held)
        return list(self.reads.values())

    def add(self, how: str, place: Any, name: Any, answer: Any) -> None:
        """Add one answer, unless the forward has set it itself."""
        key = (how, id(place), name)
        if key not in self.reads and (id(place), name) not in self._changed:
            self.reads[key] = Read(how, place, name, answer)

    def attribute(self, owner: Any, name: str, value: Any) -> None:
        """Add that ``owner.name`` was read: from the object itself, or from its class."""
        held = _attributes(owner)
        if (id(held), name) in self._changed:
            return
        if name == "training" and isinstance(owner, nn.Module):  # each thread has its own answer
            self.add("attribute", owner, name, value)
            return
        if name in ("_parameters", "_buffers"):  # read again by their names
            for each, tensor in value.items():
                self.add("item", value, each, _kind(tensor))
            return
        if held is not None and name in held:
            if isinstance(value, Tensor):
                self.tensors[id(value)] = owner, name
                self._reached[id(value)] = value
            self.add("item", held, name, _kind(value))
            self.look_into(value)
        else:
            found = unpatched(getattr(type(owner), name, MISSING))
            if found is MISSING or isinstance(found, _MEMBERS):
                self.add("attribute", owner, name, value)
            elif found is vars(nn.Module).get(name, MISSING):
                return
            else:
                if held is not None:
                    self.add("item", held, name, MISSING)
                self.add("attribute", type(owner), name, found)
                self.look_into(found)

    def look_into(self, value: Any) -> None:
        """Read what ``value`` is made of with it, and watch the objects in it."""
        if value is None or is_proxy(value) or id(value) in self._reached:
            return
        if isinstance(value, _LEAVES):
            return
        self._reached[id(value)] = value
        if isinstance(value, types.FunctionType):
            self._functions[id(value)] = value
        elif isinstance(value, types.MethodType):
            self.look_into(value.__func__)
            self.look_into(value.__self__)
        elif isinstance(value, (staticmethod, classmethod)):
            self.look_into(value.__func__)
        elif isinstance(value, property):
            self.look_into(value.fget)
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self.look_into(part)
        elif is_container(value):
            if not isinstance(value, (tuple, frozenset)):
                self.add("contents", value, None, contents(value))
            for item in contents(value).values:
                self.look_into(item)
        elif is_watched(kind := type(value)):
            self._watch(kind)

    def _watch(self, kind: type) -> None:
        """Note the attributes that are read from objects of this class from now on."""
        called = getattr(kind, "__call__", None)  # noqa: B004 (Python looks it up in the class)
        if isinstance(called, types.FunctionType):
            self.add("attribute", kind, "__call__", called)
            self.look_into(called)
        if kind not in self._classes:
            self._classes.add(kind)
            self._patches.enter_context(
                patched(
                    (kind, "__getattribute__", self._noted),
                    (kind, "__setattr__", self._noted_set),
                )
            )

    def _start(self, frame: Any) -> None:
        """Note the globals that a function which starts now will read."""
        code = frame.f_code
        if id(code) in self._started:
            return
        self._started[id(code)] = code
        made_here = id(code) in self._inner  # its closure holds locals of a function that runs
        self._inner.update(id(each) for each in code.co_consts if isinstance(each, types.CodeType))
        if of_a_library(code.co_filename) or "namedtuple_" in frame.f_globals.get("__name__", ""):
            return
        self._ran.add(id(code))
        self.looks_closely = self.looks_closely or looks_closely(code)
        for chain in global_names(code):
            self._global(frame.f_globals, chain)
        if code.co_freevars and not made_here:
            for name, value in frame.f_locals.items():
                if name in code.co_freevars:
                    self.look_into(value)

    def _global(self, known: dict[str, Any], chain: tuple[str, ...]) -> None:
        """Add the answers of a look-up such as ``F.softmax``, as far as it leads by names."""
        value = unpatched(known.get(chain[0], MISSING))
        if value is MISSING:
            return  # one of Python's own
        self.add("item", known, chain[0], value)
        for name in chain[1:]:
            if isinstance(value, types.ModuleType) and name in vars(value):
                known, value = vars(value), unpatched(vars(value)[name])
                self.add("item", known, name, value)
            elif isinstance(value, type) and hasattr(value, name):
                owner, found = value, getattr(value, name)
                value = unpatched(found)
                if value is not found and isinstance(found, types.MethodType):
                    break  # a class method that is replaced while this capture runs
                self.add("attribute", owner, name, value)
            else:
                break
        self.look_into(value)

    def _noted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def read(owner: Any, name: str) -> Any:
            value = original(owner, name)
            if name[:2] != "__" and name not in _OF_MODULES and not self.is_executing():
                if isinstance(owner, nn.Module) or id(owner) in self._reached:
                    self.attribute(owner, name, value)
            return value

        return read

    def _noted_child(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def read(owner: Any, name: str) -> Any:
            value = original(owner, name)
            if not self.is_executing() and not is_proxy(value):
                for held in map(vars(owner).get, ("_parameters", "_buffers", "_modules")):
                    if held is not None and name in held:
                        self.add("item", held, name, _kind(value))
            return value

        return read

    def _noted_set(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def write(owner: Any, name: str, value: Any) -> None:
            if not self.is_executing() and (
                isinstance(owner, nn.Module) or id(owner) in self._reached
            ):
                self._keep(owner, name)
            original(owner, name, value)

        return write

    def _keep(self, owner: Any, name: str) -> None:
        """Keep what ``owner.name`` is before the forward sets it."""
        places = [_attributes(owner)]
        if isinstance(owner, nn.Module):
            places += [vars(owner).get(each) for each in ("_parameters", "_buffers", "_modules")]
        for held in places:
            if held is not None and (id(held), name) not in self._changed:
                self.changes.append((owner, held, name, held.get(name, MISSING)))
                self._changed.add((id(held), name))


def _kind(value: Any) -> Any:
    """Return what a read of ``value`` is compared by: a tensor is read again by the graph."""
    return TensorKind.of(value) if isinstance(value, Tensor) else value


def _attributes(owner: Any) -> dict[str, Any] | None:
    """Return the ``__dict__`` of an object, None if it has none."""
    try:
        held: dict[str, Any] = object.__getattribute__(owner, "__dict__")
    except AttributeError:
        return None
    return held
