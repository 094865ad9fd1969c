"""One insertion at a port, as data that is applied to every graph of its host."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal[
    "attention", "ffn", "linear", "convolution", "experts", "norm", "position", "embedding",
    "trunk", "stack", "block",
]  # fmt: skip


CALLS = ("trunk", "stack", "block", "experts")  # kinds of site that are edited around a call


TOLD = ("positions", "padding", "cached")  # what a module can read of the call that runs


Verb = Literal["insert", "add", "replace", "feed", "wrap"]


@dataclass(frozen=True)
class Edit:
    """One insertion, as data; it is applied again to every graph of its host.

    Attributes:
        site, kind: the key and the kind of the site.
        port, verb: the port that is edited, and how (see :class:`surgery.OpenPort`).
        child: the name of the inserted module among the host's children.
        reads: the ports that the module is called with.
        batch_first: whether the first axis of the port is the batch.
        grouped: the class of the inserted module if modules of it can run as one, each for rows of
            its own (``RunsGrouped``), and this edit lets them.
    """

    site: str
    kind: Kind
    port: str
    verb: Verb
    child: str
    reads: tuple[str, ...]
    batch_first: bool = True
    grouped: type | None = None

    def why_whole(self, routed: bool) -> str:
        """Say why this edit cannot count in part: scaled, or for some rows; empty if it can."""
        if self.verb == "wrap":
            return "it stands around a whole call, which may change what all rows share"
        if self.kind == "position":
            return "it moves the positions of tokens, for all rows"
        if routed and not self.batch_first:
            return "the batch is not the first axis there"
        return ""

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
