"""Weights that are tensors of a class of their own, as quantised ones are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from tests.support.models import build, inputs, logits


class Quantised(Tensor):
    """Integers and a scale for each row. It has a linear map, and no other operation."""

    @staticmethod
    def __new__(cls, weight: Tensor) -> Quantised:
        made: Quantised = Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)  # type: ignore[attr-defined]
        made.scale = weight.abs().amax(1, keepdim=True) / 127
        made.numbers = (weight / made.scale).round().to(torch.int8)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.numbers.to(x.dtype) * weight.scale, *bias)
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} of a quantised weight")


def quantised() -> nn.Module:
    model = build("llama").requires_grad_(False)
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(Quantised(module.weight.detach()), requires_grad=False)
    return model


@pytest.mark.parametrize("name", ["lora", "inducer", "prefix", "ffn_adapter"])
def test_a_model_of_such_weights_is_spliced_and_trained(name: str) -> None:
    model, given = quantised(), inputs("llama")
    base = logits(model, given)
    method = surgery.method(name)
    surgery.splice(model, method)
    surgery.freeze_base(model)
    if method.start == "exact":
        assert torch.equal(logits(model, given), base)
    logits(model, given).square().sum().backward()
    assert all(p.grad is not None for _, p in surgery.spliced_parameters(model))
    with pytest.raises(surgery.SpliceError, match="Nothing has changed"):
        surgery.merge(model)
