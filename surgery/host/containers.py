"""Keep inserted modules out of the loops in which a host's own forward runs its children.

A stack of blocks runs all its children in order: ``nn.Sequential``, a module that loops over
``self.children()``. What is spliced around such a stack is a child of it, too, and must not be
called as one more block. So the host's class leaves inserted children out: a container always, any
other module while its own forward runs. ``modules()`` and ``parameters()`` show them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from surgery.host.state import inserted_children

_compiling = torch.compiler.is_dynamo_compiling
_NOTHING = nullcontext()


class _Running(threading.local):
    def __init__(self) -> None:
        self.hosts: list[nn.Module] = []


_running = _Running()


def hiding(module: nn.Module) -> AbstractContextManager[Any]:
    """Hide what is inserted from ``module.children()`` while the module's own forward runs."""
    return _NOTHING if _compiling() else _hidden(module)


@contextmanager
def _hidden(module: nn.Module) -> Iterator[None]:
    outer = len(_running.hosts)
    try:
        try:
            _running.hosts.append(module)
            yield
        finally:
            del _running.hosts[outer:]
    finally:  # once more: an exception may have come in the line above
        del _running.hosts[outer:]


def container_methods(original: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """Return the methods of a host class that leave inserted children out."""

    def named_children(self: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        hidden: set[str] = set()
        if any(host is self for host in _running.hosts):
            hidden = inserted_children(self)
        for name, child in original.named_children(self):
            if name not in hidden:
                yield name, child

    def own(self: nn.Module) -> dict[str, Any]:
        hidden = inserted_children(self)
        return {name: child for name, child in self._modules.items() if name not in hidden}

    def item(self: Any, index: Any) -> Any:
        children = own(self)
        if isinstance(index, slice):
            return original(dict(list(children.items())[index]))
        return list(children.values())[index]

    methods: dict[str, Callable[..., Any]] = {"named_children": named_children}
    if issubclass(original, (nn.Sequential, nn.ModuleList)):
        methods["__iter__"] = lambda self: iter(own(self).values())
        methods["__len__"] = lambda self: len(own(self))
    if issubclass(original, nn.Sequential):
        methods["__getitem__"] = item
    if issubclass(original, nn.ModuleDict):
        methods["__iter__"] = lambda self: iter(own(self))
        methods["__len__"] = lambda self: len(own(self))
        for name in ("keys", "items", "values"):
            methods[name] = lambda self, name=name: getattr(own(self), name)()
    return methods
