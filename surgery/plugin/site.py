"""Sites and ports: the places of a model that a method can edit, as they were found."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from surgery.errors import PortError, suggest
from surgery.plugin.edit import HostPlan, Kind
from surgery.plugin.notebook import html_table

_VERBS = ("insert", "add", "replace", "feed", "wrap", "frozen")


# Why a port that a site usually has can be missing, where the locator noted no reason.
_USUALLY = dict.fromkeys(
    ("weights", "scores"), "one call computes its softmax; attn_implementation='eager' shows it"
)


@dataclass(frozen=True)
class Port:
    """A named value inside a site. Inside ``Method.splice`` it is an :class:`OpenPort`.

    Attributes:
        name: one of the names in the legend of :class:`Site`.
        width: size of its last axis.
        in_width: width of its projection's input; None if no projection makes the port.
        weight, bias: names in the model of that projection's matrix and bias; empty if the
            projection has none, or none of its own.
        transposed: whether that matrix is stored as (out, in).
        module: path of the module that computes it; empty if the forward uses the weight itself.
        stacked: whether ``weight`` is a stack of such matrices, one for each expert.
        tied: the name of the same parameter at the first embedding that has it as its table; empty
            if ``weight`` is that name, or no table.
        shared: whether another site runs the same weight, as streams of one attention may.
        columns: the columns of a fused projection that belong to the port; None means all.

    Example:
        ``site.port("query").width``
    """

    name: str
    width: int
    in_width: int | None
    weight: str = ""
    bias: str = ""
    transposed: bool = False
    stacked: bool = False
    module: str = ""
    tied: str = ""
    shared: bool = False
    columns: tuple[int, ...] | None = field(default=None, repr=False)

    if not TYPE_CHECKING:  # a type checker knows that the verbs are OpenPort's

        def __getattr__(self, name: str) -> NoReturn:
            if name in _VERBS:
                raise PortError(
                    f"port {self.name!r}: {name} works only inside Method.splice(site). "
                    "Call surgery.splice(model, method, at=sites)."
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


@dataclass(frozen=True, eq=False)
class Site:
    """One place of a model that a method can edit: an attention, an FFN, or another kind.

    Shape legend, the same letters everywhere:

        B batch    n query length    m key length (cache included)    D model width
        H heads    G kv heads        d head width    F FFN width      r rank    P prefix length

    Ports of an attention site:

        input                          (B, n, D)     input of the query projection
        query key value                (B, n, H d), (B, m, G d)   projections, before the split
        query_heads                    (B, H, n, d)  into the attention call: after rotary encoding
        key_heads value_heads          (B, G, m, d)  likewise, and after the KV cache
        query_unrotated                (B, H, n, d)  query heads before a rotary encoding, after
                                                     the norm of queries
        mask                           the attention mask as the call receives it
        scores                         what the softmax is taken of, where it has weights
        weights                        the softmax output, if the model computes it
        context                        heads mixed, as the attention call returns them
        merged                         (B, n, H d)   the same heads side by side: the input of the
                                                     output projection
        lse                            (B, H, n)     logsumexp of the masked, scaled scores; can
                                                     only be read; -inf or the lowest number for a
                                                     query that sees no key
        output                         (B, n, D)     after the output projection

    After a module with ``total_lse(*reads)`` has replaced ``merged``, ``lse`` counts that module's
    keys too.

    Ports of an FFN site: ``input`` (B, n, D), ``up`` and, if gated, ``gate`` (B, n, F),
    ``activation`` (B, n, F; input of the last projection), ``output`` (B, n, D).

    Other kinds: a *linear* layer and a *norm* have ``input`` and ``output``; an *embedding* of
    tokens has ``ids``, ``rows`` (the rows of its table, before the model scales them) and
    ``output``; a *position* has ``positions``, the whole numbers that are encoded there. A
    *convolution* of more than one position has ``input`` (B, D, h, w) and ``output``, with the
    axes that the model has. *Experts* are a module with the weights of all experts of a block,
    each a stack (E, in, out) or (E, out, in) and a port: ``up``, ``gate`` if it has weights of
    its own (else ``up`` makes both), ``output``. Three kinds wrap a whole module call (port
    ``call``): the *trunk* is the smallest module that contains the embedding and every
    attention (an encoder and a decoder that embed tokens have one each); the *stack* is its
    child that contains every attention but not the embedding, if there is one; a *block* is the
    smallest module with one attention and one FFN. A block has the ports ``input`` and ``output``,
    too: the hidden states (B, n, D) in front of it and behind it.

    Attributes:
        path: the host, i.e. the smallest module that contains the site whole, output projection
            included.
        key: tells the site from other sites of the same host.
        kind: ``attention``, ``ffn``, or one of the other kinds above.
        layer: the first number in the path, None if there is none.
        stream: the number of the stream, from 1, where one attention has several sequences of
            tokens, each with projections of its own; 0 where it has one. The streams of an
            attention are sites of one host. Each has its own queries, ``merged`` and ``output``;
            keys and values are those of all streams, and virtual tokens are for its queries alone.
        cross: whether the queries attend to another sequence.
        causal: whether every query sees earlier keys only.
        heads, kv_heads, head_width, value_width: H, G, d and the width of a value head.
        width: the model width D.
        scale: the factor of the scores, where it could be read.
        softcap: scores s become softcap tanh(s / softcap); None if they do not.
        stretch: the factor by which a rotary encoding multiplies each feature's products; empty if
            every factor is 1.
        slopes: for each head how much more key j + 1 scores than key j, where the model adds just
            that to the scores, and nothing to those of key 0 (ALiBi); else empty.
        distances: path of the module whose table says what the model adds to a score for the
            distance of its key from the query; else empty. See ``OpenSite.by_distance``.
        window: how many of the last keys a query sees; None if all, or if only a mask says it.
        dtype, device: what inserted modules are cast to.
        missing: ports that such a site may have and this one lacks, with the reason.
        norm: path of the norm in front of the site, if nothing else adds to what that norm reads.
        untrained: why no gradient of a loss on the model's output reaches the site; empty if one
            does.
        ids, call: of a trunk: the argument that holds the token ids, and the arguments of the
            example call by name.
        role: of a trunk or a stack: ``decoder`` if some of its queries attend to another sequence;
            ``encoder`` if none do, and the model has one such decoder; else empty.
        picked: the ports that ``Sites.matching`` chose by the names of their modules, which alone a
            method edits; empty if the site was chosen whole.
        memory: of a decoder's trunk: the arguments that belong to the sequence that it attends to,
            as far as the example shows: hidden states, and what another trunk is given, too.
        teller: the path of the module whose call tells what a module can read of it (``positions``,
            ``padding``, ``cached``), and its argument with the token ids, if it has one.
        batch_first: whether the batch is the first axis of the ports; False where the sequence is
            first, or the tokens of all examples lie in one row.

    Example:
        ``site = surgery.locate(model).attention[0]``; ``print(site.path, site.heads, site.ports)``
    """

    path: str
    key: str
    kind: Kind
    width: int
    ports: Mapping[str, Port] = field(default_factory=dict)
    stream: int = 0
    cross: bool = False
    causal: bool = False
    heads: int = 0
    kv_heads: int = 0
    head_width: int = 0
    value_width: int = 0
    scale: float | None = None
    softcap: float | None = None
    stretch: tuple[float, ...] = ()
    slopes: tuple[float, ...] = ()
    distances: str = ""
    window: int | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    host: HostPlan | None = field(default=None, repr=False)
    missing: dict[str, str] = field(default_factory=dict)
    norm: str = ""
    untrained: str = ""
    ids: str = ""
    call: dict[str, Any] = field(default_factory=dict, repr=False)
    role: str = ""
    memory: tuple[str, ...] = ()
    batch_first: bool = True
    picked: tuple[str, ...] = ()
    teller: tuple[str, str] = field(default=("", ""), repr=False)

    @property
    def identity(self) -> tuple[str, str, str]:
        """Path, key and kind: together they tell the site from every other of its model."""
        return (self.path, self.key, self.kind)

    @property
    def layer(self) -> int | None:
        """The first number in the path, such as 3 in ``transformer.h.3.attn``."""
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", self.path)
        return int(number.group(1)) if number else None

    def __repr__(self) -> str:
        size = f", {self.heads} heads of {self.head_width}" if self.heads else ""
        rest = f": {self.description}{size}, width {self.width}, {_counted(self.ports)}>"
        path, room = self.path or "(root)", 100 - len("<Site ") - len(rest)
        return f"<Site {path if len(path) <= room else '…' + path[1 - room :]}{rest}"

    def _repr_html_(self) -> str:
        rows = [
            (p.name, p.width, p.in_width or "", p.weight, p.module) for p in self.ports.values()
        ]
        notes = [f"no {name}: {why}" for name, why in self.missing.items()]
        columns = ("port", "width", "reads", "weight", "module")
        return html_table(repr(self)[6:-1], columns, rows, notes)

    @property
    def description(self) -> str:
        """The kind in words, such as ``causal self-attention`` or ``gated FFN``."""
        if self.kind not in ("attention", "ffn"):
            return self.kind
        if self.kind == "ffn":
            if "activation" not in self.ports:
                return "expert FFN"
            return "gated FFN" if "gate" in self.ports else "FFN"
        stream = f", stream {self.stream}" if self.stream else ""
        causal = "causal " if self.causal else ""
        return f"{causal}{'cross' if self.cross else 'self'}-attention{stream}"

    def port(self, name: str) -> Port:
        """Return the port of that name.

        Raises:
            PortError: this site lacks the port; the message lists its ports.
        """
        if name not in self.ports:
            why = self.missing.get(name) or _USUALLY.get(name)
            raise PortError(
                f"{self.description} at {self.path}: no port {name!r}{f' ({why})' if why else ''}. "
                f"{suggest(name, self.ports)}Ports here: {', '.join(self.ports)}."
            )
        return self.ports[name]


def _counted(ports: Mapping[str, Port]) -> str:
    return f"{len(ports)} port{'s' if len(ports) != 1 else ''}"
