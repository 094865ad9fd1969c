"""Tests of attention whose logsumexp cannot be had: refused with the reason, where it is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import surgery
from tests.support import models
from tests.zoo.build import build


def test_an_lse_that_cannot_be_had_is_refused_with_the_reason_and_lora_is_not() -> None:
    tiny = build("longformer")
    sites = surgery.locate(tiny.model, tiny.inputs).attention
    assert len(sites)
    with pytest.raises(surgery.SiteError, match=r"no lse: its query heads are not \(B, H, n, d\)"):
        surgery.splice(tiny.model, surgery.method("inducer"), at=sites)
    report = surgery.splice(tiny.model, surgery.method("lora", rank=2), at=sites)
    assert len(report.sites) == len(sites)


class Sealed(torch.autograd.Function):
    """A custom attention kernel: nobody sees a softmax."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return (q @ k.mT).softmax(-1) @ v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            given = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            out = (given[0] @ given[1].mT).softmax(-1) @ given[2]
        return torch.autograd.grad(out, given, grads[0])


def sealed(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    return Sealed.apply(query, key, value).transpose(1, 2), None


def test_an_attention_kernel_of_a_users_own_takes_lora_and_refuses_inducer() -> None:
    transformers.AttentionInterface.register("sealed", sealed)
    model = models.build("llama")
    model.set_attn_implementation("sealed")
    base = models.logits(model, models.inputs("llama"))
    with pytest.raises(surgery.SpliceError, match="so its logsumexp cannot be had"):
        surgery.splice(model, surgery.method("inducer"))
    assert torch.equal(models.logits(model, models.inputs("llama")), base)
    report = surgery.splice(model, surgery.method("lora", rank=2))
    assert len(report.sites) == 2
    assert torch.equal(models.logits(model, models.inputs("llama")), base)
    models.perturb(model)
    assert not torch.equal(models.logits(model, models.inputs("llama")), base)
