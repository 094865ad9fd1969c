"""Describe one occurrence of a site in a graph by the nodes of its ports."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from surgery.patterns.dataflow import value
from surgery.patterns.projection import Projection, features_last
from surgery.patterns.replay import Replay


@dataclass
class PortNode:
    """A port in one graph: the node that holds its value, and the projection that makes it.

    Edits of the graph update it, so that each edit starts where the last one ended.

    Attributes:
        node: the node whose value is the port's, or contains it as ``columns``.
        projection: the port's own projection; None if no projection makes it.
        columns: the port's columns of ``node``; None is all of them.
        features: the port's columns of its projection's output; None is all of them.
        sequence_first: ``node`` is (n, B, D), where everything else has the batch first.
        channels_first: ``node`` is (B, D, h, w), as convolutions have it.
        heads_first: ``node`` is (B, H, n, d), as a context is, where D is H d.
        own: once the port has been fed, the call of its projection that only this port reads.
    """

    node: fx.Node
    projection: Projection | None = None
    columns: list[int] | None = None
    features: list[int] | None = None
    sequence_first: bool = False
    channels_first: bool = False
    heads_first: bool = False
    own: fx.Node | None = None

    @property
    def width(self) -> int:
        """The number of features of the port."""
        if self.columns:
            return len(self.columns)
        whole = self.projection is not None and self.node is self.projection.node
        return self.projection.width if whole else int(self.tokens.shape[-1])  # type: ignore[union-attr]

    @property
    def tokens(self) -> Tensor:
        """The value of the node, with its features as the last axis."""
        if self.heads_first:
            return value(self.node).transpose(1, 2).flatten(2)  # type: ignore[no-any-return]
        return features_last(value(self.node), self.channels_first)


@dataclass
class Match:
    """One occurrence of a site in a graph.

    Attributes:
        kind: ``attention``, ``ffn``, ``linear``, or ``module`` for a host that is one whole module.
        key: the path of the module that runs the core; ``#1``, ``#2`` tell several sites apart.
        core: an attention's softmax, or the call that contains it; else the last projection.
        ports: by name, see the legend in ``help(surgery.Site)``.
        nodes: the nodes from its projections to its output, all inside the host.
        scale: the factor of the scores; None if it could not be read.
        softcap: scores s become softcap tanh(s / softcap); None if they do not.
        window: how many of the last keys a query sees, if the call says so.
        softmax_input: what the softmax reads; None if one call contains it.
        heads, kv_heads: H and G; 0 if unknown.
        parts: the attention calls on chunks of one sequence that this match joins.
        order: the order of axes that makes the query heads (B, H, n, d); None if they are.
        orders: likewise for ``key_heads`` and ``value_heads``, (B, G, m, d).
        uncounted_virtual: for each inserted module with a ``total_lse`` that the lse does not count
            yet, its name in the host, the nodes that it reads, and how it counts if in part.
        stream: the number of its stream, from 1, if it is one of several; else 0.
        replay: how the context becomes the merged heads, if rows of the query heads are not the
            output's tokens in order.
        exposed: the node of the logsumexp that the attention call returns, once it is exposed;
            the streams of one attention share the list.
        missing: ports that the site lacks, and why.
    """

    kind: str
    key: str
    core: fx.Node
    ports: dict[str, PortNode]
    nodes: list[fx.Node] = field(default_factory=list)
    scale: float | None = None
    softcap: float | None = None
    window: int | None = None
    softmax_input: fx.Node | None = None
    heads: int = 0
    kv_heads: int = 0
    parts: list[Match] = field(default_factory=list)
    order: tuple[int, ...] | None = None
    head_orders: dict[str, tuple[int, ...]] = field(default_factory=dict)
    uncounted_virtual: list[tuple[str, tuple[fx.Node, ...], Any]] = field(default_factory=list)
    stream: int = 0
    replay: Replay | None = None
    exposed: list[fx.Node] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def is_site(self, kind: str, key: str) -> bool:
        """Whether this is the site of a kind and key.

        A whole module has one match, of kind ``module``, for its norm, embedding or position.
        """
        whole = self.kind == "module" and kind not in ("attention", "ffn")
        return self.key == key and (self.kind == kind or whole)

    @property
    def value_width(self) -> int:
        """The width of a value head, d_v."""
        shape = value(self.ports["value_heads"].node).shape
        order = self.head_orders.get("value_heads")
        return int(shape[order[-1] if order else -1])

    @property
    def one_key(self) -> bool:
        """Whether the example has a single key, so that the softmax is 1 whatever the query."""
        if "key_heads" not in self.ports:
            return False
        shape = value(self.ports["key_heads"].node).shape
        order = self.head_orders.get("key_heads") or range(len(shape))
        return bool(shape[order[-2]] == 1)


def uses_of(graph: fx.Graph, name: str) -> int:
    """Return how often a graph runs a module of the host, or uses a parameter, of this name."""
    nodes = [n for n in graph.nodes if n.op in ("call_module", "get_attr") and n.target == name]
    return sum(1 if n.op == "call_module" else len(n.users) for n in nodes)


def weights_in(nodes: Iterable[fx.Node]) -> frozenset[str]:
    """Return the modules and parameters that these nodes run with, by their names in the host."""
    return frozenset(str(n.target) for n in nodes if n.op in ("call_module", "get_attr"))
