"""Let every query of a layer attend to trained keys and values as well (prefix-tuning).

    f' = softmax([scale Q P_k^T ; S]) [P_v ; V]                        P_k, P_v (G, P, d) per layer
       = (1 - g) f + g softmax(scale Q P_k^T) P_v
    g  = sigmoid(lse_P - lse)           lse_P = logsumexp(scale Q P_k^T), lse that of the scores S

Li and Liang 2021, arXiv:2101.00190. The second line equals the first (Chen et al. 2022,
arXiv:2210.14469, section 3), so no key is concatenated, no mask grows and no position shifts.
Without gradients a decoded token attends to [P_k ; K] in one call (``surgery.LeadsCache``).
Prefix keys are always visible and never rotated. Where the model adds s_h j to the scores of key j
(ALiBi), ``shift`` adds s_h (p - P) to those of prefix key p, which then stands in front of the
tokens. Where it adds t_h(i - j) for the distance of query i from key j (T5; the places i of queries
go on in a KV cache), ``shift`` adds t_h(P + i - p) to the scores of prefix key p.
``gate`` multiplies g by tanh of a trained scalar per head that starts at 0 (Zhang et al. 2023,
arXiv:2303.16199).

``share`` selects how P_k and P_v are made (Le et al. 2024, arXiv:2410.02200); rows p are (P, D):

    none     free parameters                                         ("no-share")
    simple   p Wk + bk, p Wv + bv with the layer's frozen projections, after the frozen norm in
             front of the attention if there is one; not rotated     ("simple-share")
    linear   tanh(p W + b)
    layer    tanh(p Wa + ba) Wb + bb                                 ("deep-share")
    global   the same with p, Wa, ba for all layers                  (Li and Liang's MLP)

A saved adapter always holds plain keys and values, not the parameters they were made of.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import surgery
from surgery_plugins.prefix_tables import Reparametrised, Share


class Prefix(nn.Module):
    """Compute ``f + g (prefix's context - f)``, which replaces the merged heads f.

    Shape:
        merged (B, n, H d_v), query (B, H, n, d) as scored, lse (B, H, n) -> (B, n, H d_v)
    Parameters:
        keys (G, P, d)  values (G, P, d_v)  N(0, std), or ``made``, a :class:`Reparametrised`
        gate (H,)  zeros, if ``gate``;  tau (2,)  ones, in NoRGa
    """

    def __init__(self, site: surgery.OpenSite, method: PrefixTuning) -> None:
        super().__init__()
        self.scored = {"scale": site.scale, "softcap": site.softcap}
        self.made: Reparametrised | None = None
        if method.share == "none":
            shape = (site.kv_heads, method.length)
            self.keys = nn.Parameter(method.start_values(*shape, site.head_width))
            self.values = nn.Parameter(method.start_values(*shape, site.value_width))
        else:
            self.made = Reparametrised(site, method.share, method.length, method.hidden, method.std)
        self.dropout = surgery.Dropout(method.dropout)
        self.gate = nn.Parameter(torch.zeros(site.heads)) if method.gate else None
        self.tau = nn.Parameter(torch.ones(2)) if method.residual else None
        self.lower: Tensor | None
        lower = _lower(site, method.length) if method.shift else None
        self.register_buffer("lower", lower, persistent=False)
        self.by_distance = site.by_distance() if method.shift else None
        self._cached: tuple[Any, tuple[Tensor, Tensor]] | None = None
        self._leading: tuple[Tensor, Tensor] | None = None

    def tables(self) -> tuple[Tensor, Tensor]:
        """Keys (G, P, d), values (G, P, d_v); without gradient recomputed only after a change."""
        if self.made is None:
            return self.keys, self.values
        if torch.is_grad_enabled() or self.training or torch.compiler.is_compiling():
            self._cached = None
            return self.made()
        sources = list(self.made.sources())
        if any(p.is_inference() for p in sources):  # inference tensors have no _version
            return self.made()
        stamp = [(p.data_ptr(), p._version, p.dtype) for p in sources]
        if self._cached is None or self._cached[0] != stamp:
            self._cached = stamp, self.made()
        return self._cached[1]

    def train(self, mode: bool = True) -> Prefix:
        self._cached = self._leading = None
        return super().train(mode)

    def plain_state(self) -> dict[str, Tensor]:
        """The tensors to store after training: keys, values, and the scalars."""
        keys, values = self.made() if self.made else (self.keys, self.values)
        scalars = dict(self.named_parameters(recurse=False))
        return {**scalars, "keys": keys.detach(), "values": values.detach()}

    def forward(
        self, merged: Tensor, query: Tensor, lse: Tensor, cached: Tensor | None = None
    ) -> Tensor:
        tokens = self.tokens(cached)
        for name in ("keys", "values") if self.training else ():
            tokens[name] = self.dropout(tokens[name])
        return surgery.virtual_tokens(merged, query, lse, **tokens)

    def total_lse(
        self, merged: Tensor, query: Tensor, lse: Tensor, cached: Tensor | None = None
    ) -> Tensor:
        """The logsumexp of all keys, the prefix's included, for methods later in the list."""
        return surgery.virtual_lse(query, lse, **self.tokens(cached))

    def leading_keys(self) -> tuple[Tensor, Tensor] | None:
        """The keys and values, unless a gate, NoRGa's residual or places change their scores.

        The tuple is a new one after ``train()`` and ``eval()``, and where tables are new tensors.
        """
        if self.gate is not None or self.bends:
            return None
        keys, values = self.tables()
        known = self._leading
        if known is None or known[0] is not keys or known[1] is not values:
            known = self._leading = keys, values
        return known

    def tokens(self, cached: Tensor | None = None) -> dict[str, Any]:
        """The arguments of ``surgery.virtual_tokens`` that describe this prefix."""
        keys, values = self.tables()
        gate = None if self.gate is None else torch.tanh(self.gate)
        bend = (lambda scores: self.bend(scores, cached)) if self.bends else None
        return {"keys": keys, "values": values, "scores": bend, "gate": gate, **self.scored}

    @property
    def bends(self) -> bool:
        """Whether scores are more than products of queries and keys."""
        return any(x is not None for x in (self.tau, self.lower, self.by_distance))

    def bend(self, scores: Tensor, cached: Tensor | None = None) -> Tensor:
        """Return NoRGa's ``s + tau_2 tanh(tau_1 s)``, and what the model adds to s first."""
        if self.by_distance is not None:
            n, length = scores.shape[-2:]
            before = length if cached is None else length + cached
            added = self.by_distance(n, length, before, scores.device)
            scores = scores + added.to(scores.dtype)
        scores = scores if self.lower is None else scores + self.lower.to(scores.dtype)
        if self.tau is None:
            return scores
        inner, outer = self.tau.to(scores.dtype)
        return scores + outer * torch.tanh(inner * scores)


def _lower(site: surgery.OpenSite, length: int) -> Tensor | None:
    """Return what ALiBi adds to the scores of the keys, (H, 1, P); None without ALiBi."""
    if not site.slopes:
        return None
    return torch.tensor(site.slopes)[:, None, None] * (torch.arange(length) - length)


class Later(nn.Module):
    """Return ``positions + P``: the positions (..., n) of tokens after a prefix."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def forward(self, positions: Tensor) -> Tensor:
        return positions + self.length


@dataclass(frozen=True)
class PrefixTuning(surgery.Method):
    """Let every query attend to trained keys and values, at sites that have the port ``lse``.

    Args:
        length: number P of keys and values per layer.
        gate: whether each head has a gate that starts at 0, so that the model starts unchanged.
        std: standard deviation of the initial keys and values, or rows and weights; 0 starts keys
            and values at 0, and the attention at (1 - g) f.
        share: ``none``, ``simple``, ``linear``, ``layer`` or ``global``, see the top of this file.
        hidden: inner width m of the MLP of ``layer`` and ``global``.
        shift: whether real tokens get the positions P, P + 1, ..., as where a prefix is put into
            a KV cache. Needs a model that encodes positions by number, or adds to the score of a
            key by its place (ALiBi) or its distance (T5); there prefix keys get the places in
            front of the tokens.
        dropout: probability, on keys and values.

    Start: none; gated with ``gate`` and without ``shift``. Not mergeable. A KV cache stays that of
    the base. Cost per layer: 2 P G d [+ H], which is also the size stored. Trained instead:
    simple P D; linear P D + (D + 1) 2 G d; layer P D + (D + 1) m + (m + 1) 2 G d;
    global (m + 1) 2 G d, and P D + (D + 1) m once.
    """

    name = "prefix"
    kinds = ("attention", "position")
    size = ("length",)

    length: int = 20
    gate: bool = False
    std: float = 0.02
    share: Share = "none"
    hidden: int = 512
    shift: bool = False
    dropout: float = 0.0

    residual = False  # True in NoRGa

    def __post_init__(self) -> None:
        self.require(isinstance(self.length, int) and self.length >= 1, "length", "an integer >= 1")
        for option in ("gate", "shift"):
            self.require(isinstance(getattr(self, option), bool), option, "True or False")
        self.require(self.std >= 0, "std", "a number >= 0")
        known = ("none", "simple", "linear", "layer", "global")
        self.require(self.share in known, "share", f"one of {', '.join(known)}")
        trains = self.share == "none" or self.std > 0
        self.require(trains, "std", "a number > 0 where keys and values are made of rows")
        self.require(isinstance(self.hidden, int) and self.hidden >= 1, "hidden", "an integer >= 1")
        self.require(0 <= self.dropout < 1, "dropout", "in [0, 1)")

    @property
    def start(self) -> surgery.Start:
        return "gated" if self.gate and not self.shift else "none"

    def start_values(self, *shape: int) -> Tensor:
        """Return initial keys or values."""
        return torch.randn(shape) * self.std

    def plain(self) -> PrefixTuning:
        return dataclasses.replace(self, share="none")

    def check(self, sites: list[surgery.Site]) -> None:
        own = [site for site in sites if site.kind == "attention" and not site.cross]
        placed = bool(own) and all(site.slopes or site.distances for site in own)
        if self.shift and not placed and not any(site.kind == "position" for site in sites):
            raise surgery.SiteError(
                f"method {self.name!r} with shift=True: no module of this model encodes positions "
                "by number, or the selection leaves that module out. "
                "Leave shift out, splice without at=, or select with Sites.where."
            )

    def suits(self, site: surgery.Site) -> bool:
        if site.kind == "position":
            return self.shift
        if self.share == "simple":
            ports = [site.ports.get(name) for name in ("key", "value")]
            widths = (site.kv_heads * site.head_width, site.kv_heads * site.value_width)
            pairs = zip(ports, widths, strict=True)
            if not all(port and port.weight and port.width == width for port, width in pairs):
                return False
        return "lse" in site.ports

    def splice(self, site: surgery.OpenSite) -> None:
        if site.kind == "position":
            site.port("positions").insert(Later(self.length), name=self.name)
            return
        made = Prefix(site, self)
        told = ("cached",) if made.by_distance else ()
        reads = ("merged", "query_heads", "lse", *told)
        site.port("merged").replace(made, name=self.name, reads=reads)


@dataclass(frozen=True)
class NoRGa(PrefixTuning):
    """Tune a prefix whose scores pass a nonlinear residual gate.

        s := s + tau_2 tanh(tau_1 s)              two scalars per layer, 1 at the start

    Le et al. 2024, arXiv:2405.14124.

    Args:
        As for ``prefix``. With ``share="none"`` keys and values start from U(-1, 1).

    Start: none; with ``gate`` gated. Not mergeable. Cost: that of the prefix, and 2 per layer.
    """

    name = "norga"
    residual = True

    def start_values(self, *shape: int) -> Tensor:
        return torch.empty(shape).uniform_(-1, 1)


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    register(PrefixTuning)
    register(NoRGa)
