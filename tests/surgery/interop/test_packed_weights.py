"""4-bit layers that pack their weights for inference, as bitsandbytes' do on some CPUs."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery


class PackingLinear(nn.Linear):
    """Passes no gradient once it has run in evaluation mode."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.support_avx512bf16_for_cpu = True

    def forward(self, x: Tensor) -> Tensor:
        packs = self.support_avx512bf16_for_cpu and not self.training
        if packs and not x.requires_grad:
            self.weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)  # type: ignore[attr-defined]
        if hasattr(self.weight, "quant_state"):
            return F.linear(x.detach(), self.weight.detach(), self.bias.detach())
        return F.linear(x, self.weight, self.bias)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = PackingLinear(), PackingLinear()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x).relu())
        return result


def splice(model: nn.Module) -> Any:
    sites = surgery.locate(model, torch.zeros(2, 3, 8))
    return surgery.splice(model, surgery.method("lora", ports=("all",)), at=sites + sites.linear)


def flags(model: Any) -> list[bool]:
    return [model.first.support_avx512bf16_for_cpu, model.second.support_avx512bf16_for_cpu]


def test_nothing_is_packed_while_something_is_spliced_in() -> None:
    model = Net().eval()
    splice(model)
    model(torch.randn(2, 3, 8))
    copied = copy.deepcopy(model)
    for each in (model, copied):
        surgery.freeze_base(each)
        each.train()(torch.randn(2, 3, 8)).sum().backward()
        trained = dict(surgery.spliced_parameters(each))
        assert all(p.grad is not None for name, p in trained.items() if name.endswith(".b"))
        assert flags(each) == [False, False]
    surgery.remove(model)
    assert flags(model) == [True, True]
    assert not any("surgery" in name for m in model.modules() for name in vars(m))
    assert flags(copied) == [False, False]


def test_a_refused_splice_leaves_the_layers_as_they_were() -> None:
    model = Net().eval()
    with pytest.raises(surgery.SurgeryError):
        surgery.splice(model, surgery.method("prefix"), example_inputs=torch.zeros(2, 3, 8))
    assert flags(model) == [True, True]
    assert not hasattr(model.first.weight, "quant_state")


def test_a_packed_base_is_refused_by_the_name_of_its_layer() -> None:
    model = Net().eval()
    with torch.no_grad():
        model(torch.zeros(2, 3, 8))
    with pytest.raises(surgery.SpliceError, match=r"first has packed its 4-bit weight"):
        splice(model)
