"""Quantised layers of one's own: an adapter's whole life, and merging into what they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from tests.support.models import build, inputs, logits, perturb

IDS = torch.arange(14).reshape(2, 7) + 3


class Packed(nn.Module):
    """A linear layer in eight bits with a scale for each output, as GPTQ's and AWQ's are."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scales", scales)
        self.register_buffer("packed", (linear.weight.detach() / scales).round().to(torch.int8))
        self.bias = linear.bias

    def rounded(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.rounded(x), self.packed.to(x.dtype) * self.scales, self.bias)


class RoundsInput(Packed):
    """The input is rounded to eight bits, too."""

    def rounded(self, x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
        return x + ((x / step).round() * step - x).detach()


class Bends(Packed):
    """No linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


def quantised(kind: type[Packed] = Packed, name: str = "llama") -> Any:
    model = build(name).eval()
    for module in list(model.modules()):
        for child, layer in list(module.named_children()):
            if type(layer) is nn.Linear and layer is not getattr(model, "lm_head", None):
                setattr(module, child, kind(layer))
    return model


@pytest.mark.parametrize("kind", [Packed, RoundsInput])
def test_the_life_of_an_adapter_on_packed_layers(kind: type[Packed], tmp_path: Path) -> None:
    model, case = quantised(kind), inputs("llama")
    base, state = logits(model, case), list(model.state_dict())
    report = surgery.splice(model, surgery.method("lora", ports=("all",)))
    assert len(report.inserted) == 14
    assert torch.equal(logits(model, case), base)
    surgery.freeze_base(model)
    model.train()(input_ids=IDS).logits.square().mean().backward()
    assert all(p.grad is not None for _, p in surgery.spliced_parameters(model))
    perturb(model.eval(), 0.1)
    tuned = logits(model, case)
    surgery.save(model, tmp_path)
    assert torch.equal(logits(surgery.load(quantised(kind), tmp_path), case), tuned)
    assert model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] == 10
    with pytest.raises(surgery.SpliceError, match="dequantize=True"):
        surgery.merge(model)
    merged = surgery.merge(model, dequantize=True)
    bound = {Packed: 1e-6, RoundsInput: 0.02}[kind]
    assert len(merged.errors) == 14
    assert (max(merged.errors.values()) > 1e-3) == (kind is RoundsInput)
    assert max(merged.errors.values()) < bound
    assert "dequantised 14 layers, off by up to" in repr(merged)
    gap = (logits(model, case) - tuned).detach()
    assert float(gap.norm() / tuned.detach().norm()) < bound
    surgery.unmerge(model, merged)
    assert torch.equal(logits(model, case), tuned)
    surgery.remove(model)
    assert torch.equal(logits(model, case), base)
    assert list(model.state_dict()) == state


def test_only_layers_with_an_adapter_are_dequantised() -> None:
    model, case = quantised(name="roberta"), inputs("roberta")
    surgery.splice(model, surgery.method("lora", ports=("query",), bias=True))
    perturb(model)
    tuned = logits(model, case)
    merged = surgery.merge(model, dequantize=True)
    assert len(merged.dequantized) == len(merged.folded)
    assert any(isinstance(m, Packed) for m in model.modules())
    torch.testing.assert_close(logits(model, case), tuned, rtol=1e-4, atol=1e-5)


def test_what_is_no_linear_layer_is_refused_and_nothing_changes() -> None:
    model, case = quantised(Bends), inputs("llama")
    surgery.splice(model, surgery.method("lora"))
    perturb(model)
    tuned = logits(model, case)
    with pytest.raises(surgery.SpliceError, match=r"cannot be dequantised.*no linear layer"):
        surgery.merge(model, dequantize=True)
    assert torch.equal(logits(model, case), tuned)
    assert not any(type(m) is nn.Linear for m in model.model.modules())
