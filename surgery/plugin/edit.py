"""One insertion at a port, as data that is applied to every graph of its host."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal[
    "attention", "ffn", "linear", "norm", "position", "embedding", "trunk", "stack", "block"
]


CALLS = ("trunk", "stack", "block")  # kinds of site whose one port is the call of the module


Verb = Literal["insert", "add", "replace", "feed", "wrap"]


@dataclass(frozen=True)
class Edit:
    """One insertion, as data; it is applied again to every graph of its host.

    Attributes:
        site, kind: the key and the kind of the site.
        port, verb: the port that is edited, and how (see :class:`surgery.OpenPort`).
        child: the name of the inserted module among the host's children.
        reads: the ports that the module is called with.
    """

    site: str
    kind: Kind
    port: str
    verb: Verb
    child: str
    reads: tuple[str, ...]

    @property
    def batched(self) -> bool:
        """Whether the module's output is (B, n, D) because the module reads heads."""
        made = ("query_unrotated", "query_heads", "lse", "merged")
        return any(name in made for name in self.reads)


@dataclass(frozen=True)
class HostPlan:
    """The module whose forward is rewritten, and the arguments of one call of it.

    Attributes:
        path: the path of the module in the model.
        through: paths below it of the modules that capture traces through.
        args, kwargs: the arguments with which the module was called when it was located.
    """

    path: str
    through: frozenset[str]
    args: tuple[Any, ...] = field(repr=False)
    kwargs: dict[str, Any] = field(repr=False)
