"""Edit: one insertion at a port, as data, and whether it may be made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from surgery.errors import PortError

Kind = Literal[
    "attention", "ffn", "linear", "norm", "position", "embedding", "trunk", "stack", "block"
]


CALLS = ("trunk", "stack", "block")  # sites whose one port is the call of the module


@dataclass(frozen=True)
class Edit:
    """One insertion, as data: it is applied again to every graph of its host."""

    site: str
    kind: Kind
    port: str
    verb: Literal["insert", "add", "replace", "feed", "wrap"]
    child: str
    reads: tuple[str, ...]

    @property
    def batched(self) -> bool:
        """Is what it inserts (B, n, D), because it is made from heads?"""
        made = ("query_unrotated", "query_heads", "lse", "merged")
        return any(name in made for name in self.reads)


@dataclass(frozen=True)
class HostPlan:
    """The module whose forward is rewritten, and with what it was called when it was seen."""

    path: str
    through: frozenset[str]
    args: tuple[Any, ...] = field(repr=False)
    kwargs: dict[str, Any] = field(repr=False)


def require_insertable(
    site: Any, port: Any, verb: str, module: Any, name: str, reads: tuple[str, ...]
) -> None:
    """Raise unless ``module`` may be inserted at ``port`` of ``site``, under this name.

    Raises:
        PortError: no module, no name, a port that is not edited this way, something that cannot be
            read, or a part of the base inside the module.
    """
    where = f"{verb} at port {port.name!r} of {site.path}"
    if not isinstance(module, nn.Module):
        raise PortError(f"{where}: {module!r} is no nn.Module. Pass an object of one.")
    if not name.isidentifier():
        raise PortError(f"{where}: name={name!r} must be an identifier, for it names a module.")
    if port.name == "lse" or (port.name == "call" and verb != "wrap"):
        only = "read" if port.name == "lse" else "wrapped"
        raise PortError(f"{where}: {port.name!r} can only be {only}. Edit another port.")
    if isinstance(reads, str):
        raise PortError(f"{where}: reads={reads!r} must be a tuple: ({reads!r},).")
    for read in reads:
        name_of_port, _, part = read.partition(".")
        known = site.port(name_of_port)
        if part and (part not in ("source", "bias") or not (known.in_width or known.bias)):
            raise PortError(
                f"{where}: {read!r} cannot be read. A port that a projection makes has '.source', "
                f"what that reads, and '.bias'; {name_of_port!r} is read as it is."
            )
    for inner, part_of_it in (*module.named_modules(), *module.named_parameters()):
        if id(part_of_it) in site.base_parts:
            raise PortError(
                f"{where}: {inner or 'the module'} of what is inserted is part of the base, and "
                "would be trained and moved with it. Hold it by surgery.Reference(module), or use "
                "port.frozen() or site.frozen_norm()."
            )
