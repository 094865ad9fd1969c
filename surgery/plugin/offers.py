"""What plugins can offer, methods and tasks, and what a class must be to be one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from surgery.errors import MethodError, RecipeError, SurgeryError
from surgery.plugin.base_classes import Method
from surgery.plugin.option_types import undecorated
from surgery.plugin.task_class import Task


@dataclass(frozen=True)
class Offer:
    """A kind of thing that plugins offer: its hook, its base class, and its words in errors."""

    what: str
    option: str
    hook: str
    base: type[Any]
    error: type[SurgeryError]

    def check(self, cls: Any, offers: str) -> None:
        """Raise unless a class can be registered; ``offers`` begins the message."""
        if isinstance(cls, self.base):
            raise self.error(
                f"{offers} {cls!r}, an object, which is not a class. Call "
                f"register({type(cls).__name__})."
            )
        if not isinstance(cls, type):
            raise self.error(f"{offers} {cls!r}, which is not a class. Call register(MyClass).")
        base = f"surgery.{self.base.__name__}"
        if not issubclass(cls, self.base):
            raise self.error(
                f"{offers} {cls!r}, which does not derive from {base}. Write "
                f"class {cls.__name__}({base})."
            )
        if names := undecorated(cls, self.base):
            raise self.error(
                f"{offers} {cls!r}, which is not a dataclass: its option {names[0]!r} could not be "
                "set or saved. Write @dataclass(frozen=True) above the class."
            )
        if not getattr(cls, "name", ""):
            raise self.error(f'{offers} {cls.__name__}, which has no name. Set `name = "..."`.')


METHODS = Offer("method", "option", "register_methods", Method, MethodError)


TASKS = Offer("task", "data option", "register_tasks", Task, RecipeError)


OFFERS = (METHODS, TASKS)
