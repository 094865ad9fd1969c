"""Replace the projections of a site by others of the same sizes, such as those of another model.

    y' = x W' + b'      instead of y = x W + b, for each projection of the site

``surgery.transplant`` copies the weights in. Spliced by itself the method starts from random ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

import surgery


@dataclass(frozen=True)
class Transplant(surgery.Method):
    """Replace every projection of attention, FFN or linear sites.

    A projection has a bias where the base's has one. Experts, whose weights are stacks, are not
    for this method.

    Start: none. Cost: the weights and biases of the sites' projections.
    """

    name = "transplant"
    kinds = ("attention", "ffn", "linear")

    @property
    def start(self) -> surgery.Start:
        return "none"

    def suits(self, site: surgery.Site) -> bool:
        return site.kind in self.kinds and bool(_ports(site))

    def splice(self, site: surgery.OpenSite) -> None:
        for port in site.select(_ports(site)):
            assert port.in_width is not None  # _ports() names no other
            module = nn.Linear(port.in_width, port.width, bias=bool(port.bias))
            port.replace(module, name=self.name, reads=(f"{port.name}.source",))


def _ports(site: surgery.Site) -> list[str]:
    """Return the ports that a plain matrix makes."""
    return [n for n, p in site.ports.items() if p.weight and p.in_width and not p.stacked]


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    register(Transplant)
