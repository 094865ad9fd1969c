"""Ask the plugins of this process: methods and tasks by name, and the answers of other hooks."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import fx, nn

from surgery.plugin.base_classes import Method
from surgery.plugin.found_attention import FoundAttention
from surgery.plugin.registry import registry
from surgery.plugin.task_class import Task

Offered = TypeVar("Offered", bound=type[Any])


def is_leaf(module: nn.Module, path: str) -> bool | None:
    """Return the installed plugins' answer whether to keep a module whole (hookspecs.is_leaf)."""
    return registry().is_leaf(module, path)


def find_sites(graph: fx.Graph, root: nn.Module) -> list[FoundAttention]:
    """Return the attentions that installed plugins point out (hookspecs.find_sites)."""
    return registry().find_sites(graph, root)


def register(cls: Offered) -> Offered:
    """Offer a method or task in this process, as an installed plugin would: for notebooks.

    From then on ``surgery.method``, ``splice``, ``load`` and ``check_method`` know the class by its
    name. A class of the same name that was registered by a call before is replaced, so a cell can
    run again.

    Args:
        cls: a frozen dataclass that derives from :class:`surgery.Method` or :class:`surgery.Task`.

    Returns:
        the class, so that ``@surgery.register`` may stand above ``@dataclass(frozen=True)``.

    Raises:
        MethodError, RecipeError: the class cannot be offered, or a plugin has a method or task of
            that name. Nothing has changed.

    Example:
        ``surgery.register(Mine)``; ``surgery.splice(model, "mine")``
    """
    registry().register(cls)
    return cls


def method(name: str, /, **options: Any) -> Method:
    """Return a method by its registered name: ``surgery.method("lora", rank=8)``.

    Raises:
        MethodError: no such method or option, or an impossible value.

    Example:
        >>> surgery.method("lora", rank=2).rank
        2
    """
    return registry().method(name, options)


def methods() -> dict[str, type[Method]]:
    """Return every installed method, by name.

    Example:
        >>> "lora" in surgery.methods()
        True
    """
    return registry().methods()


def task(name: str, /, **options: Any) -> Task:
    """Return a task by its registered name: ``surgery.task("sst2", path="data/sst2")``.

    Raises:
        RecipeError: no such task or option, or an impossible value.

    Example:
        ``surgery.task("sst2", path="data")``
    """
    return registry().task(name, options)


def tasks() -> dict[str, type[Task]]:
    """Return every installed task, by name.

    Example:
        >>> "sst2" in surgery.tasks()
        True
    """
    return registry().tasks()


def plugin_problems() -> list[str]:
    """Return why installed plugins could not be loaded, or are not read: one line for each."""
    return registry().problems()
