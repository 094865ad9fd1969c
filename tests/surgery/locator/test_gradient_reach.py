"""Sites at which nothing can be trained are told at the splice."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import surgery
from tests.support.forwards import Attention, tokens


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.after = Attention(), Attention()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.inside(x)
        return x + self.after(x)


class ThrownAway(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        self.inside(x)
        return x + self.after(x)


class Detached(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(x).detach()
        return x + self.after(x)


class Written(Frozen):
    """The site's output is written into a tensor in place."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, 1:] = self.inside(x)[:, 1:]
        return y + self.after(x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Frozen, "runs it under no_grad"),
        (ThrownAway, "does not depend on it"),
        (Detached, "does not depend on it"),
    ],
)
def test_a_site_without_gradient_is_told(kind: type[nn.Module], reason: str) -> None:
    model, lora = kind(), surgery.method("lora", rank=2)
    sites = surgery.locate(model, tokens())
    assert [bool(site.untrained) for site in sites] == [True, False]
    with pytest.warns(UserWarning, match=f"at 1 of 2 places .* inside: .*{reason}"):
        surgery.splice(model, lora, example_inputs=tokens())
    model(tokens()).sum().backward()
    grads = {n: p.grad is not None for n, p in surgery.spliced_parameters(model)}
    assert {n: "after" in n for n in grads} == grads
    surgery.remove(model)
    surgery.splice(model, lora, at=sites.where(lambda site: not site.untrained))


def test_a_site_that_is_written_in_place_is_not_told() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Written()
        surgery.splice(model, surgery.method("lora", rank=2), example_inputs=tokens())
