"""What no site reaches is named; a model without attention has sites, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from tests.support import models
from tests.zoo.build import build


class Gated(nn.Module):
    """An attention whose output is gated by a projection of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.gate = nn.Linear(8, 8)
        self.unused = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = (q @ k.mT).softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(2) * self.gate(x).sigmoid())


def test_a_projection_of_no_port_and_a_module_that_did_not_run_are_named() -> None:
    model, x = Gated(), torch.randn(2, 5, 8)
    sites = surgery.locate(model, x)
    assert sites.overlooked == [
        "gate: a projection that makes no port of (root); a linear site",
        "unused: the example does not run it (108 parameters)",
    ]
    assert "no site reaches:\n  gate" in repr(sites)
    report = surgery.splice(model, surgery.method("lora", rank=2), at=sites.attention)
    assert report.overlooked == sites.overlooked
    assert "unused: the example does not run it" in repr(report)


@pytest.mark.parametrize("name", models.NAMES)
def test_nothing_is_named_where_every_projection_is_reached(name: str) -> None:
    assert not surgery.locate(models.build(name), models.inputs(name)).overlooked


def test_the_tower_of_an_example_without_images_is_named() -> None:
    tiny = build("llava")
    overlooked = surgery.locate(tiny.model, tiny.inputs).overlooked
    assert [line.partition(":")[0] for line in overlooked] == [
        "model.vision_tower",
        "model.multi_modal_projector",
    ]


class Perceptron(nn.Module):
    """Projection, nonlinearity, projection, without a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.wide(x).relu())


def test_a_perceptron_is_linear_sites_that_lora_takes_unasked() -> None:
    model, x = Perceptron(), torch.randn(3, 6)
    sites = surgery.locate(model, x)
    assert len(sites) == 0
    assert [site.path for site in sites.linear] == ["wide", "narrow"]
    base = model(x)
    report = surgery.splice(model, surgery.method("lora", rank=2), example_inputs=x)
    assert [i.path for i in report.inserted] == ["wide.lora_output", "narrow.lora_output"]
    assert "no attention here: lora is at the FFN and linear sites" in repr(report)
    assert torch.equal(model(x), base)


def test_other_methods_still_refuse_a_model_without_attention() -> None:
    with pytest.raises(surgery.SiteError, match="there is no attention site"):
        surgery.splice(Perceptron(), surgery.method("inducer"), example_inputs=torch.randn(3, 6))


class Talking(nn.Module):
    """An attention that mixes the scores of its heads, before the softmax and behind it."""

    def __init__(self, convolve: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.convolve = nn.Linear(8, 24), nn.Linear(8, 8), convolve
        make: Any = (lambda: nn.Conv2d(2, 2, 1)) if convolve else (lambda: nn.Linear(2, 2))
        self.before, self.behind = make(), make()

    def mixed(self, module: nn.Module, scores: Tensor) -> Tensor:
        if self.convolve:
            return module(scores)
        return module(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        weights = self.mixed(self.before, q @ k.transpose(-2, -1)).softmax(-1)
        y = self.mixed(self.behind, weights) @ v
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("convolve", [False, True])
def test_talking_heads_take_lora_and_refuse_what_needs_their_lse(convolve: bool) -> None:
    model, x = Talking(convolve), torch.randn(2, 5, 8)
    (site,) = surgery.locate(model, x).attention
    ports = {name: port.weight for name, port in site.ports.items() if port.weight}
    assert ports == dict.fromkeys(("query", "key", "value"), "qkv.weight") | {
        "output": "out.weight"
    }
    with pytest.raises(surgery.SiteError, match="talking heads"):
        surgery.splice(model, surgery.method("prefix"), example_inputs=x)
    base = model(x)
    surgery.splice(model, surgery.method("lora", rank=2, ports="all"), example_inputs=x)
    assert torch.equal(model(x), base)
