"""The class that a plugin's methods derive from.

What ``surgery.splice`` calls on a method, in this order:

    check_declared()    kinds, start and options are possible           once
    choose(sites)       the sites to edit; by default suits(site) says  once
    check(sites)        the chosen sites, all at once                   once
    splice(site)        insert modules at ports of the open site        each chosen site
    start               the declared effect, which is then verified     once

``surgery.save`` calls ``plain()`` and ``options()``. While a model trains, the hooks of
surgery/plugin/training_hooks.py are called.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

from surgery.errors import MethodError, shown, suggest
from surgery.plugin.edit import Kind
from surgery.plugin.open_site import OpenSite
from surgery.plugin.option_types import check_option_types, undecorated
from surgery.plugin.site import Site
from surgery.plugin.training_hooks import TrainingHooks

KINDS = get_args(Kind)


Start = Literal["exact", "gated", "none"]


@dataclasses.dataclass(frozen=True)
class Method(TrainingHooks):
    """A parameter-efficient method: a frozen dataclass of its hyperparameters.

    A subclass sets ``name``, chooses sites by ``kinds`` or :meth:`suits`, and writes
    :meth:`splice`. Options have the types of their fields when its ``__post_init__`` runs, which
    checks their values with :meth:`require`; see ``surgery/plugin/option_types.py``.

    Attributes:
        name: the name in ``surgery.method(name, ...)`` and in recipes.
        kinds: the kinds of site that the method edits; :meth:`suits` can choose more finely.
        needs: for the error where the method suits no site: what a site must have.
        together: whether its modules work only all together; their effect is then verified in one
            run of the trunk, not host by host.
        learns: whether its modules are there to learn; a gradient must then reach each parameter.
        size: the options that set how many parameters it inserts, such as ``("rank",)``: whole
            numbers that a budget of parameters is solved for. An option that is 0 stays 0.
        unsaved: why no file can hold the method, for the error of ``surgery.save``; else empty.

    Example:
        >>> @dataclass(frozen=True)
        ... class RED(surgery.Method):
        ...     name = "red"
        ...     kinds = ("ffn",)
        ...
        ...     def splice(self, site: surgery.OpenSite) -> None:
        ...         site.port("output").insert(Edit(site.width), name=self.name)
    """

    name: ClassVar[str] = ""
    kinds: ClassVar[tuple[str, ...]] = ("attention",)
    needs: ClassVar[str] = ""
    together: ClassVar[bool] = False
    learns: ClassVar[bool] = True
    size: ClassVar[tuple[str, ...]] = ()
    unsaved: ClassVar[str] = ""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        if names := undecorated(cls, Method):
            raise MethodError(
                f"{cls.__name__} is not a dataclass: its option {names[0]!r} could not be set or "
                "saved. Write @dataclass(frozen=True) above the class."
            )
        return super().__new__(cls)

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "__post_init__" in vars(cls):
            cls.__post_init__ = _after_types(cls.__post_init__)  # type: ignore

    def __post_init__(self) -> None:
        check_option_types(self)

    @property
    def start(self) -> Start:
        """The declared effect of a fresh splice, which ``surgery.splice`` verifies.

        ``exact`` leaves every output bit (a zero-initialised residual); ``gated`` does too, by a
        gate that starts at zero; ``none`` changes outputs.
        """
        return "exact"

    @property
    def lengthens(self) -> bool:
        """Whether outputs have places that the tokens have not: what reads them must bear it."""
        return False

    def suits(self, site: Site) -> bool:
        """Whether the method can be spliced at this site."""
        return site.kind in self.kinds

    def choose(self, sites: list[Site]) -> list[Site]:
        """Return those of the offered sites that the method edits: those that it suits.

        A method overrides this where one site's part depends on which others there are;
        ``OpenSite.chosen`` shows them to :meth:`splice`.
        """
        return [site for site in sites if self.suits(site)]

    def named_ports(self, site: Site) -> tuple[str, ...]:
        """Return the ports that the options name for sites of this kind.

        One list of ports may serve any architecture: what a site lacks is left out there, and the
        report of the splice names it.
        """
        return ()

    def present_ports(self, site: Site) -> tuple[str, ...]:
        """Return those of :meth:`named_ports` that this site has, each with its projection.

        At a site of which ``Sites.matching`` has picked ports, it is those instead.
        """
        names = site.picked or self.named_ports(site)
        named = [site.ports[name] for name in names if name in site.ports]
        return tuple(port.name for port in named if port.in_width is not None)

    def without_attention(self) -> Method | None:
        """Return the method for FFN and linear sites, where a model has no attention.

        None, the default, refuses such a model. ``surgery.splice`` asks only if no site was chosen.
        """
        return None

    def check(self, sites: list[Site]) -> None:
        """Look at all chosen sites at once; raise if one is missing."""

    def plain(self) -> Method:
        """Return the method to store: the same outputs, with only the tensors inference needs.

        A module whose trained parameters differ from those (a reparametrised prefix) offers
        ``plain_state()``, the ``state_dict`` of the module that ``plain()`` would insert.
        """
        return self

    def at_rank(self, rank: int) -> Method:
        """Return the method that makes modules of another rank, unscaled (``Factored``)."""
        raise MethodError(f"method {self.name!r} has no rank, so it cannot be combined that way.")

    def splice(self, site: OpenSite) -> None:
        """Insert modules at ports of ``site``. Called once per site, in the order of the list."""
        raise MethodError(f"method {type(self).__name__} does not implement splice(site).")

    def require(self, condition: bool, option: str, wish: str) -> None:
        """Raise unless ``condition`` holds of the value of ``option``."""
        if not condition:
            raise MethodError(
                f"method {self.name!r}: {option}={shown(getattr(self, option))} is not possible. "
                f"It must be {wish}."
            )

    def check_declared(self) -> None:
        """Raise unless what the class declares, and every option, is possible.

        Raises:
            MethodError: an unknown kind or start, or an option that JSON cannot hold.
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
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise MethodError(
                    f"{who}: {option}={shown(value)} cannot be written as JSON ({error}), so an "
                    "adapter with it could not be saved. Pass a name or numbers instead."
                ) from error

    def options(self) -> dict[str, Any]:
        """Return the hyperparameters as plain data, for a saved adapter."""
        return dataclasses.asdict(self)


def _after_types(check: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return a ``__post_init__`` that first checks the types of the options."""

    @functools.wraps(check)
    def checked(method: Any) -> None:
        check_option_types(method)
        check(method)

    return checked
