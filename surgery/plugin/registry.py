"""Find plugins under the entry-point group ``surgery``, and make their methods and tasks by name.

    entry points -> Registry.load -> Registry.add, per plugin -> methods() and tasks() by name
    a class of a notebook -> register(cls) -----------------------^

The plugins that come with the package are entry points too. Entry points load one by one: one that
fails, or repeats a name, is reported, and the others still load. The registry of the process is
filled on first use and lives as long as the process.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy
from torch import fx, nn

from surgery.errors import MethodError, shown, suggest
from surgery.plugin import hookspecs
from surgery.plugin.base_classes import Method
from surgery.plugin.found_attention import FoundAttention, checked
from surgery.plugin.offers import METHODS, OFFERS, TASKS, Offer
from surgery.plugin.plugin_errors import GROUP, place_of, under_other_groups
from surgery.plugin.task_class import Task

OTHER_HOOKS = ("is_leaf", "find_sites")
_HERE = "surgery.register"  # stands for the plugin of a class that was registered by a call


class Registry:
    """The plugins of one process, and the methods and tasks that they offer."""

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager("surgery")
        self.manager.add_hookspecs(hookspecs)
        self.failures: dict[str, str] = {}
        self._offered: dict[str, dict[str, tuple[type[Any], str]]] = {k.what: {} for k in OFFERS}

    def load(self, found: list[EntryPoint]) -> None:
        """Load entry points one by one."""
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
                place = place_of(error, point.value.partition(":")[0])
                self._fail(
                    point.name,
                    f"plugin {point.name!r} ({point.value}) could not be loaded: "
                    f"{type(error).__name__}: {str(error).rstrip('.')}"
                    f"{f' ({place})' if place else ''}. The other plugins are there.",
                )

    def _fail(self, name: str, message: str) -> None:
        self.failures[name] = message
        warnings.warn(message, RuntimeWarning, stacklevel=4)

    def add(self, plugin: Any, name: str) -> None:
        """Register one plugin: a module or object with ``hookimpl`` functions.

        Raises:
            MethodError, RecipeError: one of its methods or tasks has no name, or the name of
                another plugin's. Nothing of the plugin is registered then.
        """
        if isinstance(plugin, type) and issubclass(plugin, (Method, Task)):
            raise MethodError(
                f"plugin {name!r} is the class {plugin.__name__}, but an entry point names a "
                "module. Leave out what follows the colon, and offer the class in that module's "
                "register_methods(register)."
            )
        accepted: dict[str, dict[str, tuple[type[Any], str]]] = {}
        for kind in OFFERS:
            offered: list[type[Any]] = []
            implementation = getattr(plugin, kind.hook, None)
            if implementation is not None:
                implementation(register=offered.append)
            for cls in offered:
                kind.check(cls, f"plugin {name!r} offers")
            for cls in offered:
                own = [other for other in offered if other.name == cls.name]
                if len(own) > 1:
                    raise kind.error(
                        f"plugin {name!r} offers {len(own)} {kind.what}s {cls.name!r}: "
                        f"{', '.join(each.__name__ for each in own)}. Rename one of them."
                    )
                taken = self._offered[kind.what].get(cls.name)
                if taken is not None:
                    raise kind.error(
                        f"plugins {taken[1]!r} and {name!r} both offer a {kind.what} "
                        f"{cls.name!r}. Rename one of them; the first is used."
                    )
            accepted[kind.what] = {cls.name: (cls, name) for cls in offered}
        hooks = [*(kind.hook for kind in OFFERS), *OTHER_HOOKS]
        meant = [n for n in dir(plugin) if self.manager.parse_hookimpl_opts(plugin, n) is not None]
        for hook in meant:
            if hook not in hooks:
                raise MethodError(
                    f"plugin {name!r}: there is no hook {hook!r}. {suggest(hook, hooks)}Hooks: "
                    f"{', '.join(hooks)}."
                )
        if not any(accepted.values()) and not {*meant} & {*OTHER_HOOKS}:
            raise MethodError(
                f"plugin {name!r} offers nothing. Write @surgery.hookimpl in front of "
                "def register_methods(register), and call register(MyMethod) in it."
            )
        self.manager.register(plugin, name)
        for what, new in accepted.items():
            self._offered[what].update(new)

    def register(self, cls: type[Any]) -> None:
        """Offer one class by its name, in the place of one that a call has registered before."""
        kind = TASKS if isinstance(cls, type) and issubclass(cls, Task) else METHODS
        kind.check(cls, f"{_HERE} was given")
        offered = self._offered[kind.what]
        _, owner = offered.get(cls.name, (cls, _HERE))
        if owner != _HERE:
            raise kind.error(
                f"{_HERE} was given {cls.__name__}, but plugin {owner!r} offers a {kind.what} "
                f"{cls.name!r}. Give the class another name."
            )
        offered[cls.name] = (cls, _HERE)

    def methods(self) -> dict[str, type[Method]]:
        """Return every method, by name."""
        return {name: cls for name, (cls, _) in sorted(self._offered["method"].items())}

    def tasks(self) -> dict[str, type[Task]]:
        """Return every task, by name."""
        return {name: cls for name, (cls, _) in sorted(self._offered["task"].items())}

    def method(self, name: str, options: dict[str, Any]) -> Method:
        """Return an instance of the method of that name."""
        made: Method = self._make(METHODS, name, options)
        return made

    def task(self, name: str, options: dict[str, Any]) -> Task:
        """Return an instance of the task of that name."""
        made: Task = self._make(TASKS, name, options)
        return made

    def _make(self, kind: Offer, name: str, options: dict[str, Any]) -> Any:
        offered = self._offered[kind.what]
        if not isinstance(name, str):
            raise kind.error(f"the name of a {kind.what} is a text, not {shown(name)}.")
        if name not in offered:
            hint = "".join(f"\n  {text}" for text in self.problems())
            raise kind.error(
                f"no {kind.what} {shown(name)}. {suggest(name, offered)}"
                f"{kind.what.capitalize()}s here: {', '.join(sorted(offered)) or 'none'}.{hint}"
            )
        cls = offered[name][0]
        known = {f.name: f.type for f in dataclasses.fields(cls) if f.init}
        for option in options:
            if option not in known:
                raise kind.error(
                    f"{kind.what} {name!r} has no {kind.option} {shown(option)}. "
                    f"{suggest(option, known)}Options: {', '.join(known) or 'none'}."
                )
            value, wanted = options[option], known[option]
            if wanted in (bool, "bool") and isinstance(value, str):
                raise kind.error(f"{kind.what} {name!r}: {option}={value!r} must be True or False.")
            number = kind is TASKS and wanted in (int, "int", float, "float")
            if number and isinstance(value, (str, list, dict)):
                raise kind.error(f"{kind.what} {name!r}: {option}={value!r} must be a number.")
            if number and wanted in (int, "int") and isinstance(value, float):
                raise kind.error(
                    f"{kind.what} {name!r}: {option}={value!r} must be a whole number."
                )
        try:
            return cls(**options)
        except TypeError as error:
            raise kind.error(
                f"{kind.what} {name!r}: {error}. Options: {', '.join(known)}."
            ) from error

    def problems(self) -> list[str]:
        """Return why plugins are not there: one line for each."""
        return [*self.failures.values(), *under_other_groups()]

    def offers_of(self, plugin: str) -> tuple[str, ...]:
        """Return the names that a plugin offers, and its other hooks."""
        every = [(n, owner) for own in self._offered.values() for n, (_, owner) in own.items()]
        module = self.manager.get_plugin(plugin)
        hooks = [hook for hook in OTHER_HOOKS if hasattr(module, hook)]
        return tuple(n for n, owner in every if owner == plugin) + tuple(hooks)

    def is_leaf(self, module: nn.Module, path: str) -> bool | None:
        """Return the plugins' answer whether to keep a module whole."""
        answer: bool | None = self.manager.hook.is_leaf(module=module, path=path)
        return answer

    def find_sites(self, graph: fx.Graph, root: nn.Module) -> list[FoundAttention]:
        """Return the attentions that plugins point out in a graph."""
        answers = self.manager.hook.find_sites(graph=graph, root=root)
        return [each for answer in answers for each in checked(answer, graph)]


@functools.cache
def registry() -> Registry:
    """Return the registry of this process, filled on first use."""
    made = Registry()
    made.load(in_order(entry_points(group=GROUP)))
    return made


def in_order(points: Iterable[EntryPoint]) -> list[EntryPoint]:
    """Sort entry points by name, this package's own first, so none can take their place."""

    def place(point: EntryPoint) -> tuple[bool, str, str]:
        package = point.value.partition(".")[0]
        return package not in ("surgery_plugins", "surgery_recipes"), point.name, point.value

    return sorted(points, key=place)
