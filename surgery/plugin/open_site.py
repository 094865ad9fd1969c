"""A site while a method edits it: its ports have the verbs, and it knows the model.

``surgery.locate`` finds a :class:`Site`. ``surgery.splice`` opens the site for one method, calls
``Method.splice(open_site)``, and applies the edits that have gathered in it:

    Site --opened--> OpenSite --Method.splice--> edits --> graphs of the host

An open site lives as long as that call. It changes nothing in the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from surgery.errors import PortError
from surgery.plugin.edit import Edit, Verb
from surgery.plugin.frozen_parts import (
    BaseParameter,
    DistanceScores,
    FrozenModule,
    FrozenProjection,
    Reference,
)
from surgery.plugin.insertion_check import require_insertable
from surgery.plugin.module_protocols import RunsGrouped
from surgery.plugin.site import Port, Site


@dataclass(frozen=True)
class OpenPort(Port):
    """A port of an open site. Each verb notes one edit; the module becomes a child of the host.

    Every verb raises :class:`surgery.PortError` if the module may not be inserted there.

    Example:
        ``site.port("query").add(LowRank(port.in_width, port.width, rank), name="lora")``
    """

    site: OpenSite = field(kw_only=True, repr=False, compare=False)

    def insert(self, module: nn.Module, name: str) -> None:
        """``y := module(y)``."""
        self.site.note(self, "insert", module, name, ())

    def add(self, module: nn.Module, name: str, reads: tuple[str, ...] | None = None) -> None:
        """``y := y + module(*reads)``.

        ``reads`` defaults to the input of the port's own projection, or to the port itself where
        no projection makes it. A module whose forward has a parameter ``onto=None`` may be given y
        there and then returns the sum itself (see ``module_protocols.AddsOnto``).
        """
        if reads is None:
            reads = (f"{self.name}.source",) if self.in_width else (self.name,)
        self.site.note(self, "add", module, name, reads)

    def replace(self, module: nn.Module, name: str, reads: tuple[str, ...]) -> None:
        """``y := module(*reads)``; name the port itself among ``reads`` to keep its value.

        Besides ports, ``"query.source"`` (the input of the query's projection) and
        ``"query.bias"`` (the bias that the projection adds, or None) can be read wherever a
        projection makes the port. At an attention, an FFN and a block, ``"positions"`` and
        ``"padding"`` (B, n) and ``"cached"`` tell of the running call: the position of each token,
        whether it is real, and how many places the KV cache held before, 0 in a prefill.
        """
        self.site.note(self, "replace", module, name, reads)

    def feed(self, module: nn.Module, name: str) -> None:
        """``y = P(x)`` becomes ``y = P(module(x))``, where P is the port's own projection.

        Raises:
            PortError: no projection makes this port.
        """
        if self.in_width is None:
            raise PortError(f"port {self.name!r} at {self.site.path}: no projection makes it.")
        self.site.note(self, "feed", module, name, ())

    def wrap(self, module: nn.Module, name: str) -> None:
        """``forward(**arguments)`` becomes ``module(forward, **arguments)``.

        Only the port ``call`` of a trunk, a stack or a block can be wrapped, and those of experts.
        There ``module`` gets the arguments as they are, with or without a name, and may run
        ``forward`` with another weight (``parameter().updated``).
        """
        if self.name != "call" and not self.stacked:
            raise PortError(f"port {self.name!r} at {self.site.path}: only 'call' can be wrapped.")
        self.site.note(self, "wrap", module, name, ())

    def parameter(self) -> BaseParameter:
        """Return the port's weight, to be read anew at each use and updated for a while."""
        return BaseParameter(self.site.model, self.weight)

    def frozen(self) -> FrozenProjection:
        """The port's own projection as the base has it, ``x W + b``, to be called as a function.

        Raises:
            PortError: no plain matrix makes this port.
        """
        if not self.weight or self.stacked:
            raise PortError(f"port {self.name!r} at {self.site.path}: no plain matrix makes it.")
        return FrozenProjection(
            self.site.model, self.weight, self.bias, self.transposed, self.columns
        )


@dataclass(frozen=True, eq=False, repr=False)
class OpenSite(Site):
    """The site that a method edits in ``Method.splice(site)``: a :class:`Site`, opened.

    Attributes:
        model: the model that the site is in.
        chosen: all sites that the method edits in this splice.
        shared: modules that the sites of one splice share, by name (see :meth:`share`).
        base_parts: the base's own modules and parameters, by id.
        edits: the edits so far, each with the module that it inserts.

    Example:
        ``site.port("output").insert(torch.nn.Identity(), name="mine")``
    """

    ports: Mapping[str, OpenPort] = field(default_factory=dict)
    model: nn.Module = field(kw_only=True, repr=False)
    chosen: list[Site] = field(kw_only=True, repr=False)
    shared: dict[str, nn.Module] = field(kw_only=True, repr=False)
    base_parts: dict[int, Any] = field(kw_only=True, repr=False)
    edits: list[tuple[Edit, nn.Module]] = field(default_factory=list, repr=False)

    def port(self, name: str) -> OpenPort:
        """Return the port of that name, with the verbs that edit it.

        Raises:
            PortError: this site lacks the port; the message lists its ports.
        """
        super().port(name)
        return self.ports[name]

    def select(self, names: Iterable[str]) -> list[OpenPort]:
        """Return the ports of these names, in this order."""
        return [self.port(name) for name in names]

    def share(self, name: str, make: Callable[[], nn.Module]) -> nn.Module | Reference:
        """Return a module that all sites of one splice share; the first caller makes it.

        The first site gets the module itself and registers it as a child of what it inserts. The
        other sites get a :class:`Reference`: it is called alike and registers nothing. A site that
        uses the module in several places registers it once and holds
        ``surgery.Reference(module)`` in the others.
        """
        if name in self.shared:
            return Reference(self.shared[name])
        self.shared[name] = make().to(device=self.device, dtype=inserted_dtype(self.dtype))
        return self.shared[name]

    def base(self) -> Any:
        """Return the base's own module at this site."""
        return self.model.get_submodule(self.path)

    def frozen_norm(self) -> FrozenModule | nn.Identity:
        """Return the norm in front of this site as a function, the identity if there is none."""
        return FrozenModule(self.model.get_submodule(self.norm)) if self.norm else nn.Identity()

    def by_distance(self) -> DistanceScores | None:
        """Return what the model adds to a score for the distance of its key, or None.

        The result is called with n, m, the place of the first query and a device. It returns
        (1, H, n, m), for keys at the places 0, 1, ..., m - 1.
        """
        found = self.distances
        return DistanceScores(self.model.get_submodule(found)) if found else None

    def note(
        self, port: OpenPort, verb: Verb, module: nn.Module, name: str, reads: tuple[str, ...]
    ) -> None:
        """Check one edit and note it; the verbs of :class:`OpenPort` call this."""
        require_insertable(self, self.base_parts, port, verb, module, name, reads)
        module.to(device=self.device, dtype=inserted_dtype(self.dtype))
        child = f"{name}_{port.name}"
        edit = Edit(self.key, self.kind, port.name, verb, child, reads, self.batch_first)
        if isinstance(module, RunsGrouped) and not edit.batched and not edit.why_whole(True):
            if len(reads) == (verb == "add") and verb != "replace":
                edit = dataclasses.replace(edit, grouped=type(module))
        self.edits.append((edit, module))


def inserted_dtype(base: torch.dtype) -> torch.dtype:
    """Return the dtype of what is inserted: that of the base, float32 on half precision.

    In half precision small steps of an optimiser are rounded away. Cast the inserted parameters
    afterwards if they are to be half, too.
    """
    return torch.float32 if base in (torch.float16, torch.bfloat16) else base


def opened(
    site: Site,
    model: nn.Module,
    chosen: list[Site],
    shared: dict[str, nn.Module],
    base_parts: dict[int, Any],
) -> OpenSite:
    """Open ``site`` for one method; the edits gather in the result."""
    found = {f.name: getattr(site, f.name) for f in dataclasses.fields(Site)}
    ports: dict[str, OpenPort] = {}
    found["ports"] = ports
    made = OpenSite(**found, model=model, chosen=chosen, shared=shared, base_parts=base_parts)
    ports.update({name: OpenPort(**vars(port), site=made) for name, port in site.ports.items()})
    return made
