"""Match: one attention or FFN as it stands in one graph, with the nodes of its ports."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from surgery.patterns.dataflow import value
from surgery.patterns.projection import Projection


@dataclass
class PortNode:
    """A port in one graph: the node that holds its value, and the projection that makes it.

    ``columns`` are the port's columns of ``node``, ``features`` those of its projection; None is
    all of them.
    """

    node: fx.Node
    projection: Projection | None = None
    columns: list[int] | None = None
    features: list[int] | None = None
    sequence_first: bool = False  # (n, B, D), where everything else has the batch first
    own: fx.Node | None = None  # the call of its projection that only this port reads, once fed

    @property
    def width(self) -> int:
        if self.columns:
            return len(self.columns)
        whole = self.projection is not None and self.node is self.projection.node
        return self.projection.width if whole else int(value(self.node).shape[-1])  # type: ignore[union-attr]


@dataclass
class Match:
    """One attention or FFN in a graph."""

    kind: str
    key: str
    core: fx.Node
    ports: dict[str, PortNode]
    nodes: list[fx.Node] = field(default_factory=list)
    scale: float | None = None
    softcap: float | None = None  # scores s become softcap tanh(s / softcap)
    window: int | None = None  # how many of the last keys a query sees, where the call says so
    softmax_input: fx.Node | None = None
    heads: int = 0
    kv_heads: int = 0
    parts: list[Match] = field(default_factory=list)  # attention calls on chunks of one sequence
    order: tuple[int, ...] | None = None  # of axes, that makes its query heads (B, H, n, d)
    orders: dict[str, tuple[int, ...]] = field(default_factory=dict)  # so of keys and values
    totals: list[tuple[str, tuple[fx.Node, ...]]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)  # ports that it has not, and why

    def holds(self, kind: str, key: str) -> bool:
        """Is this the site of that kind and key? Sites of one module are of several kinds."""
        return self.key == key and self.kind in (kind, "module")

    @property
    def one_key(self) -> bool:
        """Is there but one key to attend to, in the example?"""
        if "key_heads" not in self.ports:
            return False
        shape = value(self.ports["key_heads"].node).shape
        order = self.orders.get("key_heads") or range(len(shape))
        return bool(shape[order[-2]] == 1)
