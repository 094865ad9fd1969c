"""The options that methods with a low-rank product have: ranks, scales, and projections by name.

s = alpha / r, or alpha / sqrt(r) with ``rslora``
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import surgery

PROJECTIONS = {
    "attention": ("query", "key", "value", "output"),
    "ffn": ("up", "gate", "output"),
    "linear": ("output",),
    "convolution": ("output",),
    "experts": ("up", "gate", "output"),
    "embedding": ("rows",),
}


@dataclass(frozen=True)
class LowRankMethod(surgery.Method):
    """A method that updates projections by products of rank r; ``LoRA`` describes the options.

    Attributes:
        projections: the ports that it updates, by kind of site.
    """

    projections: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    rank: int = 8
    alpha: float = 16.0
    ports: tuple[str, ...] = ("query", "value")
    dropout: float = 0.0
    rslora: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    fused: bool = False

    def __post_init__(self) -> None:
        self.require(self.rank >= 1, "rank", "an integer >= 1")
        self.require(all(r >= 1 for r in self.ranks.values()), "ranks", "integers >= 1")
        self.require(all(a > 0 for a in self.alphas.values()), "alphas", "numbers > 0")
        for option in ("ranks", "alphas"):
            self.require(
                surgery.are_quick_patterns(getattr(self, option)), option,
                "regular expressions that end soon: with at most three open repeats (* + ? {m,n}; "
                "digits are free), none of a group but (...)?, without (?...) but (?:...), "
                "without \\1",
            )  # fmt: skip
        self.require(self.alpha > 0, "alpha", "a number > 0")
        self.require(0 <= self.dropout < 1, "dropout", "in [0, 1)")
        known = sorted({port for ports in self.projections.values() for port in ports})
        self.require(bool(self.ports), "ports", f"some of {known}")
        for port in self.ports if self.ports != ("all",) else ():
            if port not in known:
                raise surgery.PortError(
                    f"method {self.name!r}: no projection port {port!r}. "
                    f"{surgery.suggest(port, known)}Ports with a projection: {', '.join(known)}."
                )

    def suits(self, site: surgery.Site) -> bool:
        return bool(self.present_ports(site))

    def named_ports(self, site: surgery.Site) -> tuple[str, ...]:
        own = self.projections.get(site.kind, ())
        if self.ports == ("all",):
            return tuple(p for p in own if p in site.ports)
        addressed = (set(own) - {"output"}) & set(self.ports) or set(self.ports) == {"output"}
        return tuple(p for p in self.ports if p in own) if addressed else ()

    def at_rank(self, rank: int) -> LowRankMethod:
        plain = {"rslora": False, "ranks": {}, "alphas": {}, "fused": False}
        return dataclasses.replace(self, rank=rank, alpha=float(rank), **plain)

    def without_attention(self) -> LowRankMethod:
        return dataclasses.replace(self, ports=("all",))

    def rank_and_scale(self, site: surgery.Site, port: surgery.Port) -> tuple[int, float]:
        """Return r and s of one projection."""
        rank = _of(self.ranks, site, port) or self.rank
        alpha = _of(self.alphas, site, port) or self.alpha
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


def _of(values: Mapping[str, Any], site: surgery.Site, port: surgery.Port) -> Any:
    """Return the value whose pattern is found in the paths of a projection, None if none is."""
    maker = port.weight if port.stacked else port.module
    if maker in values:
        return values[maker]
    paths = (site.path, maker)
    return next((v for p, v in values.items() if any(re.search(p, path) for path in paths)), None)
