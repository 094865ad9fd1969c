"""Give an adapter rows of its own for some tokens, such as those that were added for its task.

    embedding           y = E[i] + D[i]        D[i] = 0 but for the chosen tokens
    a head tied to E    y = x (E + D)^T

An encoder and a decoder that share E share D.

D starts at zero. What is trained this way belongs to the splice: it is saved, switched, routed and
removed with the rest of the adapter, and the base keeps its table. ``surgery.train_rows`` trains
rows of the base's own table instead, which all splices share.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import surgery


class Deltas(nn.Module):
    """Hold D, for an embedding and the heads that are tied to it.

    Args:
        tokens: the chosen tokens, sorted.
        width: D.

    Shape: -> the tokens (k,), and their rows (k, D)
    Parameters: rows (k, D), zeros
    """

    tokens: Tensor

    def __init__(self, tokens: list[int], width: int) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.tensor(tokens), persistent=False)
        self.rows = nn.Parameter(torch.zeros(len(tokens), width))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.tokens, self.rows


class TokenRows(nn.Module):
    """Look up D[i], which the splice adds to the rows of an embedding.

    Shape: ids (B, n) -> (B, n, D)
    """

    def __init__(self, deltas: Any) -> None:
        super().__init__()
        self.deltas = deltas

    def trial_tokens(self) -> Tensor:
        """Return the tokens that change an output."""
        return self.deltas()[0]

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return ``E + D``, E (V, D)."""
        tokens, rows = self.deltas()
        return weight.index_add(0, tokens, rows.to(weight)), bias

    def forward(self, ids: Tensor) -> Tensor:
        tokens, rows = self.deltas()
        at = torch.searchsorted(tokens, ids.contiguous()).clamp(max=len(tokens) - 1)
        return rows[at] * (tokens[at] == ids).unsqueeze(-1)


class TokenLogits(nn.Module):
    """Add x D^T to the outputs of the chosen tokens.

    Shape: y (..., V), x (..., D) -> (..., V)
    """

    def __init__(self, deltas: Any) -> None:
        super().__init__()
        self.deltas = deltas

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return ``W + D^T`` in the columns of the tokens, W (D, V)."""
        tokens, rows = self.deltas()
        return weight.index_add(1, tokens, rows.T.to(weight)), bias

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        tokens, rows = self.deltas()
        return y.index_add(-1, tokens, (x @ rows.T.to(x.dtype)).to(y.dtype))


@dataclass(frozen=True)
class Tokens(surgery.Method):
    """Train rows of the embedding for some tokens, in a tied head too; the base keeps its own.

    Args:
        tokens: the numbers of the tokens, at least one.
        modules: a regular expression that is searched for in the paths of the embeddings; by
            default it is the one with the most rows, a model's vocabulary.

    Start: exact. Mergeable, beside a tied head with ``untie``. Cost: D per token.

    Raises:
        MethodError: no token, one that the embedding lacks, or no such embedding.

    Example:
        ``surgery.splice(model, [surgery.method("lora"), surgery.method("tokens", tokens=(50257,
        50258))])``
    """

    name = "tokens"
    kinds = ("embedding", "linear")
    needs = "an embedding with rows of its own, whose path has the pattern modules="

    tokens: tuple[int, ...] = ()
    modules: str = "."

    def __post_init__(self) -> None:
        whole = all(token >= 0 for token in self.tokens)
        self.require(bool(self.tokens) and whole, "tokens", "numbers of tokens, at least one")
        quick = surgery.are_quick_patterns([self.modules])
        self.require(bool(self.modules) and quick, "modules", "a regular expression that ends soon")

    def choose(self, sites: list[surgery.Site]) -> list[surgery.Site]:
        tables = [s for s in sites if "rows" in s.ports and re.search(self.modules, s.path)]
        if not tables:
            return []
        table = max(tables, key=lambda site: site.ports["rows"].in_width or 0)
        rows = table.ports["rows"]
        weight = rows.tied or rows.weight
        return [
            site
            for site in sites
            if any(weight in (port.weight, port.tied) for port in site.ports.values())
        ]

    def check(self, sites: list[surgery.Site]) -> None:
        count = max(s.ports["rows"].in_width or 0 for s in sites if "rows" in s.ports)
        self.require(
            max(self.tokens) < count, "tokens", f"below {count}, the rows of the embedding"
        )

    def splice(self, site: surgery.OpenSite) -> None:
        inside = site.kind == "embedding"
        width = site.port("rows").width if inside else site.port("output").in_width
        assert width is not None
        deltas = site.share("deltas", lambda: Deltas(sorted({*self.tokens}), width))
        if inside:
            site.port("rows").add(TokenRows(deltas), name=self.name, reads=("ids",))
        else:
            reads = ("output", "output.source")
            site.port("output").replace(TokenLogits(deltas), name=self.name, reads=reads)


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    register(Tokens)
