"""Method: the base class of every parameter-efficient method."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, ClassVar, Literal, get_args

from surgery.errors import MethodError, suggest
from surgery.sites import Kind, Site

KINDS = get_args(Kind)
Start = Literal["exact", "gated", "none"]


@dataclasses.dataclass(frozen=True)
class Method:
    """A parameter-efficient method: a frozen dataclass of its hyperparameters.

    A subclass sets ``name``, says which sites it is for, and writes :meth:`splice`:

    * ``name``: what ``surgery.method(name, ...)`` and recipes call it.
    * ``kinds``: the kinds of site that it is for, or :meth:`suits` for a finer choice.
    * ``needs``: what it says that it needs, where it suits no site.
    * ``together``: do its modules work only all together? Then what they do is verified in one run
      of the trunk, not host by host.
    * :attr:`start`: what a fresh splice does to the model. ``exact`` leaves every output bit
      (a zero-initialised residual), ``gated`` too, through a gate that starts at zero, ``none``
      changes outputs. ``surgery.splice`` verifies what is declared.

    Check hyperparameters in ``__post_init__`` with :meth:`require`.
    """

    name: ClassVar[str] = ""
    kinds: ClassVar[tuple[str, ...]] = ("attention",)
    needs: ClassVar[str] = ""
    together: ClassVar[bool] = False

    @property
    def start(self) -> Start:
        """What a fresh splice does to the outputs: ``exact``, ``gated`` or ``none``."""
        return "exact"

    def suits(self, site: Site) -> bool:
        """Is this method for that site?"""
        return site.kind in self.kinds

    def check(self, sites: list[Site]) -> None:
        """Look at all sites that it is about to be spliced at; raise if one is missing."""

    def plain(self) -> Method:
        """The method whose modules hold what is left of this one's after training.

        A module whose own parameters are not what it leaves (a reparametrised prefix) has
        ``plain_state()``: the ``state_dict`` of the module that ``plain()`` would insert there.
        """
        return self

    def splice(self, site: Site) -> None:
        """Insert modules at ports of ``site``. Called once per site, in the order of the list."""
        raise MethodError(f"method {type(self).__name__} does not implement splice(site).")

    def require(self, condition: bool, option: str, wish: str) -> None:
        """Raise unless ``condition`` holds of the value of ``option``."""
        if not condition:
            raise MethodError(
                f"method {self.name!r}: {option}={getattr(self, option)!r} is not possible. "
                f"It must be {wish}."
            )

    def check_declared(self) -> None:
        """Raise if what the class declares, or an option, is nothing that a splice can work with.

        Raises:
            MethodError: an unknown kind or start, or an option that no JSON can hold.
        """
        who = f"method {self.name!r}"
        for kind in self.kinds:
            if kind not in KINDS:
                raise MethodError(
                    f"{who}: there is no kind of site {kind!r}. {suggest(kind, KINDS)}"
                    f"Kinds: {', '.join(KINDS)}."
                )
        if self.start not in get_args(Start):
            raise MethodError(
                f"{who}: start={self.start!r} must be one of {', '.join(get_args(Start))}."
            )
        for option, value in self.options().items():
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise MethodError(
                    f"{who}: {option}={value!r} is nothing that JSON can hold ({error}), so an "
                    "adapter with it could not be saved. Take a name or numbers instead."
                ) from error

    def options(self) -> dict[str, Any]:
        """The hyperparameters, as plain data for a saved adapter."""
        return dataclasses.asdict(self)
