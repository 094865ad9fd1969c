"""Methods as authors may write them, right and wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from tests.support.models import build, inputs, logits


@dataclass(frozen=True)
class Scaled(surgery.Method):
    """``y * a`` at a port; what it declares may be a lie."""

    name = "scaled"
    kinds = ("attention", "ffn")
    kind: str = "ffn"
    port: str = "output"
    factor: float | str = 2.0  # an option that is a float must be finite; a text need not
    declared: surgery.Start = "exact"
    adds: bool = False

    @property
    def start(self) -> surgery.Start:
        return self.declared

    def suits(self, site: surgery.Site) -> bool:
        return site.kind == self.kind

    def splice(self, site: surgery.Site) -> None:
        made, port = Times(site.ports[self.port].width, float(self.factor)), site.port(self.port)
        if self.adds:
            port.add(made, name=self.name, reads=(self.port,))
        else:
            port.insert(made, name=self.name)


class Times(nn.Module):
    def __init__(self, width: int, factor: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.full((width,), factor))

    def forward(self, y: Tensor) -> Tensor:
        return y * self.a


@dataclass(frozen=True)
class Twice(surgery.Method):
    """One module fed to two ports of a projection."""

    name = "twice"

    def splice(self, site: surgery.Site) -> None:
        made = Times(site.width, 1.0)
        for name in ("key", "value"):
            site.port(name).feed(made, name=self.name)


@dataclass(frozen=True)
class Fed(Twice):
    name = "fed"

    def splice(self, site: surgery.Site) -> None:
        for name in ("key", "value"):
            site.port(name).feed(Times(site.width, 1.0), name=self.name)


WIDTH = build("gpt2").config.n_embd


class Shift(nn.Module):
    """``h + w``, through a function that a test may bend."""

    def __init__(self, bend: Callable[[Tensor], Any] = lambda h: h, width: int = WIDTH) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(width))
        self.bend = bend

    def forward(self, h: Tensor) -> Any:
        return self.bend(h + self.w)


@dataclass(frozen=True)
class Custom(surgery.Method):
    """Does at each site what a test says."""

    name = "custom"
    kinds = ("ffn",)
    act: Any = field(default=None, compare=False)
    declared: Any = "exact"

    @property
    def start(self) -> Any:
        return self.declared

    def options(self) -> dict[str, Any]:
        return {}

    def splice(self, site: surgery.Site) -> None:
        self.act(site)


def refused(act: Callable[[surgery.Site], Any], match: str, start: str = "none") -> None:
    """Splicing what ``act`` inserts is refused, and the model is as it was."""
    model, x = build("gpt2"), inputs("gpt2")
    expected, state = logits(model, x), {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(surgery.SurgeryError, match=match):
        surgery.splice(model, Custom(act, start))
    assert torch.equal(logits(model, x), expected)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def insert(module: Any, name: str = "x") -> Callable[[surgery.Site], None]:
    return lambda site: site.port("output").insert(module, name)


class Shared(nn.Module):
    """``x + h(z)``, h shared by all sites and zero at the start."""

    def __init__(self, site: surgery.Site) -> None:
        super().__init__()
        self.h: Any = site.share("h", lambda: nn.Linear(8, site.width))
        if isinstance(self.h, nn.Linear):
            nn.init.zeros_(self.h.weight)
            nn.init.zeros_(self.h.bias)
        self.z = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.h(self.z)
        return x + made

    def fold(self, weight: Tensor, bias: Tensor) -> Any:
        return weight, bias + self(torch.zeros(())).to(bias)

    needs_bias = True
