"""Give every query of an attention a virtual key and value of its own (inducer-tuning).

    P_k = Q + MLP_k(Q)                  the inducer's key, one for each query        (eq. 5)
    lambda = sigmoid(scale <Q, P_k> - lse)      its softmax weight among the real keys   (eq. 7)
    y = f Wo + bo + sum_h lambda^h tanh(Q^h W1^h + b1^h) W2^h + b2             (eqs 8, 9, 11)

Chen et al. 2022, arXiv:2210.14469. f is the unchanged attention output, lse the logsumexp of its
masked and scaled scores. The value branch (the sum over heads) is added after the output projection
(eq. 9), b2 once per token. The paper does not name the activation; its code uses tanh. The paper's
ablations (section 6.2):

    Extension   P_k = Q (``key_rank=0``)
    Adaptive    P_k = Q, and the value branch before the output projection:
                y = concat_h(f^h + lambda^h (tanh(Q^h W1^h + b1^h) W2^h + b2^h)) Wo + bo
    Gating      P_v without f: y = concat_h((1 - lambda^h) f^h) Wo + bo + sum_h lambda^h ... + b2
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery

Init = Literal["zero", "paper"]
Variant = Literal["inducer", "adaptive", "gating"]


class Inducer(nn.Module):
    """Compute ``sum_h lambda^h tanh(Q^h W1^h + b1^h) W2^h + b2``, added to the attention's output.

    Args:
        heads, head_width, width: H, d and D of the site.
        key_rank, value_rank: inner widths r_k (0: P_k = Q) and r_v of the two MLPs.
        scale, softcap: factor and cap of the model's own scores, used for the inducer's, too.
        dropout: probability, on lambda.
        init: ``zero`` or ``paper``, see Parameters.
        stretch: factors (d,) by which a rotary encoding multiplies the features' products in
            <Q, P_k>; empty if all are 1.

    Shape:
        query (B, H, n, d) before a rotary encoding, lse (B, H, n) -> (B, n, D)
    Parameters:
        key_w1 (H, d, r_k)  key_b1 (H, r_k)  key_w2 (H, r_k, d)  key_b2 (H, d)
        value_w1 (H, d, r_v)  value_b1 (H, r_v)  value_w2 (H, r_v, D)  value_b2 (D,)
        zero: w1 Kaiming-uniform with a = sqrt(5), all else 0: starts equal to the base
        paper: 0.01 * fmod(N(0, 1), 2) everywhere, as in the authors' code: starts near the base
    Cost: H (2 d r_k + r_k + d) + H (d r_v + r_v + r_v D) + D parameters.
    """

    def __init__(
        self,
        heads: int,
        head_width: int,
        width: int,
        key_rank: int,
        value_rank: int,
        scale: float,
        dropout: float = 0.0,
        init: Init = "zero",
        softcap: float | None = None,
        stretch: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.softcap = softcap
        self.scale = scale * stretch[0] if len(set(stretch)) == 1 else scale
        # The factors differ where an encoding rotates, and stretches, only a part of the features.
        factors = torch.tensor(stretch) if len(set(stretch)) > 1 else None
        self.register_buffer("stretch", factors, persistent=False)
        self.key_rank = key_rank
        self.dropout = surgery.Dropout(dropout)
        if key_rank:
            self.key_w1 = _weight(heads, head_width, key_rank)
            self.key_b1 = _weight(heads, key_rank)
            self.key_w2 = _weight(heads, key_rank, head_width)
            self.key_b2 = _weight(heads, head_width)
        self.value_w1 = _weight(heads, head_width, value_rank)
        self.value_b1 = _weight(heads, value_rank)
        self.value_w2 = _weight(heads, value_rank, width)
        self.value_b2 = _weight(width)
        _start(self, head_width, init)

    def gate(self, query: Tensor, lse: Tensor) -> Tensor:
        """Return lambda (B, H, n), the softmax weight of each query's inducer, in lse's dtype.

        sigmoid(score - lse) is exact at both ends; exp(score) would overflow, as <Q, Q> is large.
        """
        key = query  # (B, H, n, d)
        if self.key_rank:
            hidden = torch.tanh(_by_head(query, self.key_w1, self.key_b1))  # (B, H, n, r_k)
            key = _by_head(hidden, self.key_w2, self.key_b2, onto=query)
        # A query that sees no key has lse = -inf, or the lowest number where an additive mask hides
        # all keys. Such a query is padding: its lambda is 0, not 1.
        lse = F.threshold(lse, torch.finfo(lse.dtype).min / 2, math.inf)
        scored = query.to(lse.dtype) if self.stretch is None else query * self.stretch
        scored, key = scored.to(lse.dtype), key.to(lse.dtype)
        if self.softcap is not None:
            score = (scored * key).sum(-1) * self.scale  # (B, H, n)
            return torch.sigmoid(self.softcap * torch.tanh(score / self.softcap) - lse)
        if query.shape[-2] == 1 and not torch.is_grad_enabled() and not _autocast(query):
            rows = lse.reshape(-1, 1, 1)  # one operator for a decoded token
            d = scored.shape[-1]
            dots = (scored.reshape(len(rows), 1, d), key.reshape(len(rows), d, 1))
            return torch.sigmoid(torch.baddbmm(rows, *dots, beta=-1, alpha=self.scale)).view_as(lse)
        return torch.sigmoid((scored * key).sum(-1) * self.scale - lse)

    def fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(W, b + b2)``; the rest depends on the query and cannot be folded."""
        return weight, bias + self.value_b2.to(bias)

    needs_bias = True

    def no_weight_decay(self) -> set[str]:
        """Name the biases to trainers, as parameters without weight decay."""
        return {name for name in self._parameters if name.endswith(("_b1", "_b2"))}

    def rest(self) -> None:
        """Take b2 out of this module, once it is folded."""
        nn.init.zeros_(self.value_b2)

    def forward(self, query: Tensor, lse: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return the update, or its sum with ``onto`` (B, n, D)."""
        gate = self.dropout(self.gate(query, lse))  # (B, H, n)
        hidden = torch.tanh(_by_head(query, self.value_w1, self.value_b1))  # (B, H, n, r_v)
        hidden = (gate.unsqueeze(-1) * hidden).to(hidden.dtype)
        hidden = hidden.transpose(1, 2).flatten(-2)  # (B, n, H r_v): one matrix product for all
        out = surgery.add_product(onto, hidden, self.value_w2.flatten(0, 1))
        return out + self.value_b2.to(out.dtype)


class Fade(nn.Module):
    """Compute Gating's ``-lambda f``, added to the merged heads, with the lambda of ``inducer``.

    Shape: merged (B, n, H d_v), query (B, H, n, d), lse (B, H, n) -> (B, n, H d_v)
    Cost: no parameters.
    """

    def __init__(self, inducer: Inducer) -> None:
        super().__init__()
        self.inducer = surgery.Reference(inducer)  # a child of the host, not of this

    def forward(self, merged: Tensor, query: Tensor, lse: Tensor) -> Tensor:
        gate = self.inducer.module.gate(query, lse).transpose(1, 2)  # (B, n, H)
        f = merged.unflatten(-1, (gate.shape[-1], -1))  # (B, n, H, d_v)
        return -(gate.unsqueeze(-1) * f).flatten(2)


class Adaptive(Inducer):
    """Compute Adaptive's ``concat_h lambda^h MLP_v^h(Q^h)``, added to the merged heads.

    Shape: query (B, H, n, d), lse (B, H, n) -> (B, n, H d_v)
    Parameters: those of :class:`Inducer` at r_k = 0, but value_w2 (H, r_v, d_v), value_b2 (H, d_v)
    Cost: H (d r_v + r_v + r_v d_v + d_v) parameters.
    """

    def __init__(
        self, heads: int, head_width: int, value_width: int, value_rank: int, scale: float,
        dropout: float, init: Init, softcap: float | None = None, stretch: Sequence[float] = (),
    ) -> None:  # fmt: skip
        super().__init__(
            heads, head_width, 1, 0, value_rank, scale, dropout, init, softcap, stretch
        )
        self.value_w2 = _weight(heads, value_rank, value_width)
        self.value_b2 = _weight(heads, value_width)
        _start(self, head_width, init)

    def forward(self, query: Tensor, lse: Tensor) -> Tensor:
        gate = self.dropout(self.gate(query, lse))  # (B, H, n)
        hidden = torch.tanh(_by_head(query, self.value_w1, self.value_b1))  # (B, H, n, r_v)
        value = _by_head(hidden, self.value_w2, self.value_b2)  # (B, H, n, d_v)
        return (gate.unsqueeze(-1) * value).transpose(1, 2).flatten(2)


def _by_head(x: Tensor, weight: Tensor, bias: Tensor, onto: Tensor | None = None) -> Tensor:
    """Return ``[onto +] x @ weight + bias`` with a matrix for each head.

    Shape:
        x (B, H, n, a), weight (H, a, b), bias (H, b), onto (B, H, n, b) -> (B, H, n, b)

    Heads are the batch of one product, so no weight is copied for each example. Under autocast
    the sums stay in float32: <Q, P_k> is large, and would lose its digits in half precision.
    """
    if _autocast(x):
        made = x @ weight + bias.unsqueeze(-2)
        return made if onto is None else onto + made
    tokens = x.shape[0] * x.shape[2]
    heads, a, b = weight.shape
    rows = x.transpose(0, 1).reshape(heads, tokens, a)  # mostly a view
    if onto is None:
        made = torch.baddbmm(bias.unsqueeze(1), rows, weight)
    else:
        flat = onto.transpose(0, 1).reshape(heads, tokens, b)
        made = torch.baddbmm(flat, rows, weight) + bias.unsqueeze(1)
    return made.view(heads, x.shape[0], x.shape[2], b).transpose(0, 1)


def _autocast(x: Tensor) -> bool:
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def _start(module: nn.Module, head_width: int, init: Init) -> None:
    """Initialise the parameters as :class:`Inducer` describes; they are zeros so far."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if init == "paper":
                parameter.copy_(torch.randn_like(parameter).fmod(2.0) * 0.01)
            elif name.endswith("w1"):  # as nn.Linear starts: U(-1/sqrt(d), 1/sqrt(d))
                parameter.uniform_(-1 / math.sqrt(head_width), 1 / math.sqrt(head_width))


@dataclass(frozen=True)
class InducerTuning(surgery.Method):
    """Give every query of an attention a virtual key and value of its own.

    For attention sites that have the port ``lse``.

    Args:
        key_rank: inner width r_k of MLP_k; 0 for P_k = Q (the paper's Extension).
        value_rank: inner width r_v of MLP_v.
        dropout: probability, on lambda (the authors use the attention's dropout, 0.1).
        init: ``zero`` starts exactly at the base model, ``paper`` as the authors' code does.
        variant: ``inducer``, or an ablation: ``adaptive`` (``key_rank`` must be 0) or ``gating``.

    Start: exact; none with ``init="paper"`` (near the base), and none for ``gating``, which starts
    at (1 - lambda) f. Merging with ``partial=True`` folds b2; of ``adaptive`` nothing is folded. A
    KV cache stays that of the base. Cost per attention: see :class:`Inducer`, :class:`Adaptive`.

    Raises:
        MethodError: an option is out of range.
    """

    name = "inducer"
    size = ("key_rank", "value_rank")

    key_rank: int = 10
    value_rank: int = 15
    dropout: float = 0.0
    init: Init = "zero"
    variant: Variant = "inducer"

    def __post_init__(self) -> None:
        valid = isinstance(self.key_rank, int) and self.key_rank >= 0
        self.require(valid, "key_rank", "an integer >= 0")
        valid = isinstance(self.value_rank, int) and self.value_rank >= 1
        self.require(valid, "value_rank", "an integer >= 1")
        self.require(0 <= self.dropout < 1, "dropout", "in [0, 1)")
        self.require(self.init in ("zero", "paper"), "init", "'zero' or 'paper'")
        known = ("inducer", "adaptive", "gating")
        self.require(self.variant in known, "variant", f"one of {', '.join(known)}")
        valid = self.variant != "adaptive" or self.key_rank == 0
        self.require(valid, "key_rank", "0 for variant='adaptive', whose key is the query")

    @property
    def start(self) -> surgery.Start:
        return "exact" if self.init == "zero" and self.variant != "gating" else "none"

    def suits(self, site: surgery.Site) -> bool:
        return "lse" in site.ports

    def splice(self, site: surgery.OpenSite) -> None:
        if self.variant == "adaptive":
            adaptive = Adaptive(
                site.heads, site.head_width, site.value_width, self.value_rank, site.scale,
                self.dropout, self.init, site.softcap, site.stretch,
            )  # fmt: skip
            reads = ("query_unrotated", "lse")
            site.port("merged").add(adaptive, name=self.name, reads=reads)
            return
        inducer = Inducer(
            site.heads, site.head_width, site.width, self.key_rank, self.value_rank,
            site.scale, self.dropout, self.init, site.softcap, site.stretch,
        )  # fmt: skip
        if self.variant == "gating":
            reads = ("merged", "query_unrotated", "lse")
            site.port("merged").add(Fade(inducer), name=self.name, reads=reads)
        site.port("output").add(inducer, name=self.name, reads=("query_unrotated", "lse"))


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    register(InducerTuning)
