"""A user's typed module: ``mypy --strict`` checks it against the installed wheel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import surgery


class Scale(nn.Module):
    """``s * h``, (..., width) -> (..., width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, h: Tensor) -> Tensor:
        """Scale the last axis."""
        return self.scale * h


@dataclass(frozen=True)
class Scaled(surgery.Method):
    """Scale the output of each FFN. Start: exact."""

    name = "scaled"
    kinds = ("ffn",)

    @property
    def start(self) -> surgery.Start:
        """Ones leave every bit."""
        return "exact"

    def splice(self, site: surgery.OpenSite) -> None:
        """Insert one module."""
        port: surgery.OpenPort = site.port("output")
        port.insert(Scale(site.width), name=self.name)


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    """Offer the method."""
    register(Scaled)


def adapt(model: nn.Module, example: Tensor, folder: Path) -> int:
    """Splice, train a step, save, switch, remove; return how many numbers are trained."""
    sites: surgery.Sites = surgery.locate(model, example)
    chosen: surgery.Sites = sites.ffn.layers(0, 2)
    report: surgery.Report = surgery.splice(model, Scaled(), at=chosen, example_inputs=example)
    made: surgery.Method = surgery.method("lora", rank=2)
    second = surgery.splice(model, made, at=sites.attention, example_inputs=example, name="lora")
    frozen: surgery.Frozen = surgery.freeze_base(model)
    optimizer = torch.optim.AdamW(surgery.parameter_groups(model, lr=1e-3))
    out: Tensor = model(example)
    torch.autograd.backward([out.sum()])
    optimizer.step()
    with surgery.watch(model, ("output",)) as seen, surgery.disabled(model, second.name):
        model(example)
    site: surgery.Site = chosen[0]
    value: Tensor = seen[site, "output"]
    summary: surgery.Summary = surgery.summary(model)
    surgery.save(model, folder)
    loaded: nn.Module = surgery.remove(model, report.name)
    names: list[str] = [each.path for each in report.inserted]
    print(frozen, summary.line, value.shape, loaded is model, names)
    return summary.trainable


def refuse(model: nn.Module) -> str:
    """Return what an error says."""
    try:
        surgery.splice(model, "no such method")
    except surgery.RefusedError as error:
        return str(error)
    return ""
