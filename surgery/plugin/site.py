"""Sites: where a model can be operated on, and the ports that each of them has.

Shape legend, the same letters everywhere:

    B batch    n query length    m key length (cache included)    D model width
    H heads    G kv heads        d head width    F FFN width      r rank    P prefix length

Ports of an attention site:

    input                          (B, n, D)     what its query projection reads
    query key value                (B, n, H d), (B, m, G d)   projections, before heads are split
    query_heads                    (B, H, n, d)  into the attention call: after rotary encoding
    key_heads value_heads          (B, G, m, d)  likewise, and after the KV cache
    query_unrotated                (B, H, n, d)  query heads before a rotary encoding, after q-norm
    mask weights                   what is allowed in, and what comes out where it is computed
    context                        heads mixed, as the attention call gives them
    merged                         (B, n, H d)   the same, side by side: what makes the output
    lse                            (B, H, n)     logsumexp of the masked, scaled scores, read only;
                                                 -inf or the lowest number for a query without keys;
                                                 ``total_lse(*reads)`` of a module in the place of
                                                 ``merged``, if it has such a method
    output                         (B, n, D)     after the output projection

Ports of an FFN site: ``input`` (B, n, D), ``up`` and, if gated, ``gate`` (B, n, F), ``activation``
(B, n, F; what the last projection reads), ``output`` (B, n, D).

Of the other kinds, a linear layer or a norm has ``input`` and ``output``, an embedding of tokens
``ids`` and ``output``, a position ``positions``, the whole numbers that are encoded there. The
trunk, the smallest module from token ids to all attention, and the stack, the module in it that
holds all attention but not the embedding, if there is one, and a block, the smallest module with
an attention and an FFN, have ``call`` (:meth:`Port.wrap`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from surgery.errors import PortError, suggest
from surgery.plugin.base_parts import FrozenModule, FrozenProjection, Reference
from surgery.plugin.edit import Edit, HostPlan, Kind, require_insertable

_USUALLY = {"weights": "one call computes its softmax; attn_implementation='eager' shows it"}


@dataclass(frozen=True)
class Port:
    """A named value inside a site, and the verbs that edit it.

    Attributes:
        name: one of the names in the legend, see ``help(surgery.Site)``.
        width: size of its last axis.
        in_width: width of what its projection reads; None if no projection makes it.
        weight, bias: names in the model of that projection's matrix and bias; empty if it has
            none, or none of its own.
        transposed: is that matrix (out, in)?
        columns: which columns of a fused projection are the port's; None is all of them.
    """

    name: str
    width: int
    in_width: int | None
    site: Site = field(repr=False, compare=False)
    weight: str = ""
    bias: str = ""
    transposed: bool = False
    columns: tuple[int, ...] | None = field(default=None, repr=False)

    def insert(self, module: nn.Module, name: str) -> None:
        """``y := module(y)``."""
        self.site._edit(self, "insert", module, name, ())

    def add(self, module: nn.Module, name: str, reads: tuple[str, ...] | None = None) -> None:
        """``y := y + module(*reads)``; ``reads`` is what the port's own projection reads.

        A module whose forward ends in ``onto=None`` is given y there where it can be, to return
        the sum itself, in the dtype of y: one operation less, and a scale may be free.
        """
        if reads is None:
            reads = (f"{self.name}.source",) if self.in_width else (self.name,)
        self.site._edit(self, "add", module, name, reads)

    def replace(self, module: nn.Module, name: str, reads: tuple[str, ...]) -> None:
        """``y := module(*reads)``; name the port itself among ``reads`` to keep its value.

        Beside ports, ``"query.source"`` may be read (what the query's projection reads) and
        ``"query.bias"`` (the bias that it adds, or None), where a projection makes the port.
        """
        self.site._edit(self, "replace", module, name, reads)

    def wrap(self, module: nn.Module, name: str) -> None:
        """``module(forward, **arguments)`` takes the place of ``forward(**arguments)``.

        Only for the port ``call`` of a trunk, a stack or a block.
        """
        if self.name != "call":
            raise PortError(f"port {self.name!r} at {self.site.path}: only 'call' can be wrapped.")
        self.site._edit(self, "wrap", module, name, ())

    def frozen(self) -> FrozenProjection:
        """The port's own projection as the base has it, ``x W + b``, to be called as a function.

        Raises:
            PortError: no plain matrix makes this port.
        """
        if not self.weight or self.site.model is None:
            raise PortError(f"port {self.name!r} at {self.site.path}: no plain matrix makes it.")
        return FrozenProjection(
            self.site.model, self.weight, self.bias, self.transposed, self.columns
        )

    def feed(self, module: nn.Module, name: str) -> None:
        """``y = P(x)`` becomes ``y = P(module(x))``, P being this port's own projection.

        Raises:
            PortError: no projection makes this port.
        """
        if self.in_width is None:
            raise PortError(f"port {self.name!r} at {self.site.path}: no projection makes it.")
        self.site._edit(self, "feed", module, name, ())


@dataclass(frozen=True, eq=False)
class Site:
    """One attention or FFN of a model.

    Attributes:
        path: the module that contains it whole, output projection included (its host).
        key: tells it from other sites of the same host.
        kind: ``attention``, ``ffn``, or one of the others in the legend, ``help(surgery.Site)``.
        layer: the first number in its path, None if there is none.
        cross: does it attend to another sequence?  causal: does no query see later keys?
        heads, kv_heads, head_width, value_width: H, G, d and the width of a value head.
        width: the model width D.
        scale: the factor of the scores, where it could be read.
        softcap: scores s become softcap tanh(s / softcap), None if they stay.
        stretch: by what a rotary encoding multiplies each feature's products, none if by 1 each.
        window: how many of the last keys a query sees, None if all or if only a mask says it.
        dtype, device: what inserted modules are cast to.
        missing: ports that it might have and has not, and why.
        norm: the path of the norm in front of it, if it reads one that nothing else is added to.
        ids, call: of a trunk: the argument that holds the token ids, and its arguments by name in
            an example.
        model, shared, base_parts: while a method edits it, the model that it is in, what the sites
            of one splice share, and the base's own modules and parameters, by id.
    """

    path: str
    key: str
    kind: Kind
    width: int
    ports: dict[str, Port] = field(default_factory=dict)
    cross: bool = False
    causal: bool = False
    heads: int = 0
    kv_heads: int = 0
    head_width: int = 0
    value_width: int = 0
    scale: float | None = None
    softcap: float | None = None
    stretch: tuple[float, ...] = ()
    window: int | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    host: HostPlan | None = field(default=None, repr=False)
    edits: list[tuple[Edit, nn.Module]] | None = field(default=None, repr=False)
    missing: dict[str, str] = field(default_factory=dict)
    norm: str = ""
    ids: str = ""
    call: dict[str, Any] = field(default_factory=dict, repr=False)
    model: nn.Module | None = field(default=None, repr=False)
    shared: dict[str, nn.Module] = field(default_factory=dict, repr=False)
    base_parts: dict[int, Any] = field(default_factory=dict, repr=False)

    @property
    def identity(self) -> tuple[str, str, str]:
        """What tells it from every other site of its model."""
        return (self.path, self.key, self.kind)

    @property
    def layer(self) -> int | None:
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", self.path)
        return int(number.group(1)) if number else None

    @property
    def description(self) -> str:
        if self.kind not in ("attention", "ffn"):
            return self.kind
        if self.kind == "ffn":
            if "activation" not in self.ports:
                return "expert FFN"
            return "gated FFN" if "gate" in self.ports else "FFN"
        return (
            ("causal " if self.causal else "") + ("cross" if self.cross else "self") + "-attention"
        )

    def port(self, name: str) -> Port:
        """The port of that name.

        Raises:
            PortError: this site has no such port; it names those that there are.
        """
        if name not in self.ports:
            why = self.missing.get(name) or _USUALLY.get(name)
            raise PortError(
                f"{self.description} at {self.path}: no port {name!r}{f' ({why})' if why else ''}. "
                f"{suggest(name, self.ports)}Ports here: {', '.join(self.ports)}."
            )
        return self.ports[name]

    def select(self, names: tuple[str, ...]) -> list[Port]:
        """The ports of these names, in this order."""
        return [self.port(name) for name in names]

    def share(self, name: str, make: Callable[[], nn.Module]) -> nn.Module | Reference:
        """A module that all sites of one splice share, made by the first that asks.

        That site gets the module, to be registered as a child of what it inserts; the others get a
        reference to it, which is called alike and not registered. One site that uses it in several
        places registers it once, and ``surgery.Reference(module)`` in the others.
        """
        if name in self.shared:
            return Reference(self.shared[name])
        self.shared[name] = make().to(device=self.device, dtype=self.dtype)
        return self.shared[name]

    def base(self) -> Any:
        """The module of the base that is this site, while a method edits it."""
        assert self.model is not None
        return self.model.get_submodule(self.path)

    def frozen_norm(self) -> FrozenModule | nn.Identity:
        """The norm in front of this site as a function; the identity where there is none."""
        if not self.norm or self.model is None:
            return nn.Identity()
        return FrozenModule(self.model.get_submodule(self.norm))

    def open(
        self, model: nn.Module | None, shared: dict[str, nn.Module], base_parts: dict[int, Any]
    ) -> Site:
        """A copy that a method may edit; the edits gather in its ``edits``."""
        copy = dataclasses.replace(
            self, edits=[], ports={}, model=model, shared=shared, base_parts=base_parts
        )
        copy.ports.update({n: dataclasses.replace(p, site=copy) for n, p in self.ports.items()})
        return copy

    def _edit(
        self, port: Port, verb: Any, module: nn.Module, name: str, reads: tuple[str, ...]
    ) -> None:
        if self.edits is None:
            raise PortError(
                f"port {port.name!r} at {self.path} can be edited only inside Method.splice(site). "
                "Call surgery.splice(model, method, at=sites)."
            )
        require_insertable(self, port, verb, module, name, reads)
        module.to(device=self.device, dtype=self.dtype)
        child = f"{name}_{port.name}"
        self.edits.append((Edit(self.key, self.kind, port.name, verb, child, reads), module))
