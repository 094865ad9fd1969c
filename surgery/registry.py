"""Registry: finds plugins under the entry-point group ``surgery`` and hands out their methods.

The methods that come with the package are listed in its own entry points: they use this same door.
Entry points load one by one; one that fails, or repeats a name, is reported and the others go on.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy
from torch import nn

from surgery import hookspecs
from surgery.errors import MethodError, suggest
from surgery.method import Method


class Registry:
    """The plugins of one process, and the methods that they offer."""

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager("surgery")
        self.manager.add_hookspecs(hookspecs)
        self.failures: dict[str, str] = {}
        self._offered: dict[str, tuple[type[Method], str]] = {}

    def load(self, found: list[EntryPoint]) -> None:
        """Load entry points, one by one."""
        taken: dict[str, str] = {}
        for point in found:
            if point.name in taken and taken[point.name] != point.value:
                self._fail(
                    point.name,
                    f"two plugins are called {point.name!r}: {taken[point.name]} is used, "
                    f"{point.value} is not. Uninstall one of them.",
                )
                continue
            if point.name in taken:
                continue
            taken[point.name] = point.value
            try:
                self.add(point.load(), point.name)
            except Exception as error:
                self._fail(
                    point.name,
                    f"plugin {point.name!r} ({point.value}) could not be loaded: "
                    f"{type(error).__name__}: {error}. The other plugins are there.",
                )

    def _fail(self, name: str, message: str) -> None:
        self.failures[name] = message
        warnings.warn(message, RuntimeWarning, stacklevel=4)

    def add(self, plugin: Any, name: str) -> None:
        """Register one plugin: a module or object with ``hookimpl`` functions.

        Raises:
            MethodError: a method of it has no name, or a name that another plugin's method has.
        """
        offered: list[type[Method]] = []
        implementation = getattr(plugin, "register_methods", None)
        if implementation is not None:
            implementation(register=offered.append)
        for cls in offered:
            _check(cls, name)
            if cls.name in self._offered:
                raise MethodError(
                    f"plugins {self._offered[cls.name][1]!r} and {name!r} both offer a method "
                    f"{cls.name!r}. Rename one of them; the first is used."
                )
        self.manager.register(plugin, name)
        self._offered.update({cls.name: (cls, name) for cls in offered})

    def methods(self) -> dict[str, type[Method]]:
        """Every method, by name."""
        return {name: cls for name, (cls, _) in sorted(self._offered.items())}

    def method(self, name: str, options: dict[str, Any]) -> Method:
        """An instance of the method of that name."""
        if name not in self._offered:
            hint = "".join(f"\n  {text}" for text in self.failures.values())
            raise MethodError(
                f"no method {name!r}. {suggest(name, self._offered)}"
                f"Methods here: {', '.join(sorted(self._offered)) or 'none'}.{hint}"
            )
        cls = self._offered[name][0]
        known = [f.name for f in dataclasses.fields(cls) if f.init]
        for option in options:
            if option not in known:
                raise MethodError(
                    f"method {name!r} has no option {option!r}. {suggest(option, known)}"
                    f"Options: {', '.join(known) or 'none'}."
                )
        try:
            return cls(**options)
        except TypeError as error:
            raise MethodError(f"method {name!r}: {error}. Options: {', '.join(known)}.") from error

    def is_leaf(self, module: nn.Module, path: str) -> bool | None:
        """What the plugins say about keeping a module whole."""
        answer: bool | None = self.manager.hook.is_leaf(module=module, path=path)
        return answer


def _check(cls: type[Method], plugin: str) -> None:
    if not (isinstance(cls, type) and issubclass(cls, Method) and dataclasses.is_dataclass(cls)):
        raise MethodError(
            f"plugin {plugin!r} offers {cls!r}, which is not a dataclass deriving from "
            "surgery.Method. Decorate it with @dataclass(frozen=True)."
        )
    if not cls.name:
        raise MethodError(f'plugin {plugin!r}: {cls.__name__} has no name. Set `name = "..."`.')


@functools.cache
def registry() -> Registry:
    """The registry of this process, filled on first use."""
    made = Registry()
    made.load(sorted(entry_points(group="surgery"), key=lambda p: (p.name, p.value)))
    return made


def method(name: str, **options: Any) -> Method:
    """A method by its registered name: ``surgery.method("lora", rank=8)``.

    Raises:
        MethodError: no such method or option, or a value that is not possible.
    """
    return registry().method(name, options)


def methods() -> dict[str, type[Method]]:
    """Every installed method, by name."""
    return registry().methods()
