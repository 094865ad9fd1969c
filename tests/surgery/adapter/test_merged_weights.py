"""Tests of what can be folded into a weight: others beside it, ties, wrong folds, dtypes."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import surgery
from surgery.errors import SpliceError
from tests.support.custom_methods import Custom, Shared, Shift, insert
from tests.support.models import build, inputs, logits, perturb
from tests.support.splices import Named, methods


def test_a_tied_weight_is_refused_with_the_name_of_its_twin() -> None:
    model = build("gpt2")
    surgery.splice(
        model, surgery.method("lora", ports=("output",)), at=surgery.locate(model).linear
    )
    with pytest.raises(surgery.SpliceError, match=r"lm_head.weight is also .*wte.weight"):
        surgery.merge(model)


def test_a_weight_that_a_parametrization_has_replaced_is_refused_by_name() -> None:
    model = build("llama")
    surgery.splice(model, surgery.method("lora"))
    weight_norm(model.model.layers[0].self_attn.q_proj)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(SpliceError, match=r"layers.0.self_attn.q_proj.weight is no longer"):
        surgery.merge(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    surgery.merge(model, partial=True)
    assert surgery.spliced_parameters(model)


@pytest.mark.parametrize(
    ("first", "second", "how"),
    [
        ([("ffn_adapter", {"placement": "pfeiffer"})], [("lora", {"ports": ("output",)})], "b"),
        ([("lora", {"ports": ("key", "value")})], [("prefix", {"share": "simple"})], "a"),
        ([("bitfit", {})], [("prefix", {"share": "simple", "std": 0.5})], "a"),
        ([("bitfit", {})], [("ssb", {})], "a"),
        ([("inducer", {}), ("ssb", {"ports": ("output",)})], [], "partial"),
        ([("lora", {"ports": ("up",)}), ("ffn_adapter", {"placement": "pfeiffer"})], [], "partial"),
        ([("ssb", {}), ("bitfit", {})], [], "partial"),
    ],
)  # fmt: skip
def test_what_is_merged_beside_others_leaves_outputs_or_is_refused(
    first: list[Named], second: list[Named], how: str
) -> None:
    x, model = inputs("gpt2"), build("gpt2").double()
    surgery.splice(model, methods(*first), name="a")
    if second:
        surgery.splice(model, methods(*second), name="b")
    perturb(model, 0.3)
    before = logits(model, x)
    refusal = pytest.raises(SpliceError, match="cannot be merged")
    with nullcontext() if how == "partial" else refusal:
        surgery.merge(model, **({"partial": True} if how == "partial" else {"name": how}))
    torch.testing.assert_close(logits(model, x), before, rtol=0, atol=1e-12)


def test_a_refused_module_stands_in_the_way_of_those_behind_it() -> None:
    """Llama's projections have no bias to take LoRA's up; (IA)^3 behind it must wait."""
    x, model = inputs("llama"), build("llama").double()
    ports = {"ports": ("key", "value")}
    surgery.splice(model, methods(("lora", {"bias": True, **ports}), ("ia3", ports)))
    perturb(model, 0.3)
    before = logits(model, x)
    surgery.merge(model, partial=True)
    torch.testing.assert_close(logits(model, x), before, rtol=0, atol=1e-12)


def test_a_merged_weight_must_fit_its_dtype() -> None:
    model = build("gpt2").half()
    surgery.splice(model, surgery.method("ia3"))
    with torch.no_grad():
        for _, parameter in surgery.spliced_parameters(model):
            parameter.fill_(6e4)
        model.transformer.h[0].attn.c_attn.weight.fill_(600)
    with pytest.raises(SpliceError, match=r"not finite in torch.float16\. Nothing has changed"):
        surgery.merge(model)


def test_a_tie_of_two_parameters_in_one_place_is_not_merged_into() -> None:
    model = build("gpt2")
    model.load_state_dict(model.state_dict(), assign=True)  # tied by storage, not by object
    assert model.lm_head.weight is not model.transformer.wte.weight
    head = surgery.locate(model).linear
    surgery.splice(model, surgery.method("lora", rank=2, ports=("output",)), at=head)
    with pytest.raises(surgery.SpliceError, match=r"is also .*, which must stay as it is"):
        surgery.merge(model)


class Gain(nn.Linear):
    """Nearly the linear map that its weight says."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 1.03 * self.weight, self.bias)


def test_a_projection_that_is_nearly_plain_is_not_merged_into() -> None:
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj.__class__ = Gain
    surgery.splice(model, surgery.method("lora", rank=2, ports=("query",)))
    with pytest.raises(surgery.SpliceError, match="not made by one plain floating-point matrix"):
        surgery.merge(model)


def test_what_others_use_is_not_folded_away() -> None:
    """Layer 0 owns what layer 1 uses; layer 1 stays, for something stands in its way."""
    model, x = build("gpt2"), inputs("gpt2")
    second = surgery.locate(model).ffn[1:]
    surgery.splice(model, Custom(insert(Shift(torch.tanh)), "none"), at=second, name="first")
    surgery.splice(
        model, Custom(lambda site: site.port("output").insert(Shared(site), "x")), name="second"
    )
    perturb(model)
    expected = logits(model, x)
    with pytest.raises(surgery.SpliceError, match="'custom' stands before it and stays"):
        surgery.merge(model, "second")
    merged = surgery.merge(model, "second", partial=True)
    assert not merged.folded
    assert len(merged.left) == 2
    assert [n for n in model.state_dict() if "x_output.h" in n]
    assert torch.equal(logits(model, x), expected)
    model.double()
    torch.testing.assert_close(logits(model, x).float(), expected, rtol=1e-4, atol=1e-5)


class Rescaled(nn.Module):
    """Adds what it takes for each output of W to have the norm m; it reads W as the base has it."""

    def __init__(self, port: surgery.Port) -> None:
        super().__init__()
        self.base = port.frozen()
        self.m = nn.Parameter(self.base.matrix().norm(dim=0).clone())

    def factor(self) -> Tensor:
        return self.m / self.base.matrix().norm(dim=0) - 1

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.base.matrix() * self.factor()

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.base.matrix() * self.factor(), bias


def test_a_module_that_reads_the_weight_it_is_folded_into_can_be_folded() -> None:
    def act(site: surgery.Site) -> None:
        for port in site.select(("query", "value")):  # columns of one fused projection
            port.add(Rescaled(port), "x")

    @dataclass(frozen=True)
    class Attention(Custom):
        kinds = ("attention",)

    model, x = build("gpt2"), inputs("gpt2")
    surgery.splice(model, Attention(act))
    perturb(model)
    expected = logits(model, x)
    surgery.merge(model)
    assert not list(surgery.spliced_parameters(model))
    torch.testing.assert_close(logits(model, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fold", "what"),
    [
        (lambda self, w, b: w, "fold fails|fold gives other shapes"),
        (lambda self, w, b: (w.T, b), "its fold gives other shapes"),
        (lambda self, w, b: (w, None), "its fold gives other shapes"),
        (lambda self, w, b: 1 / 0, "its fold fails .ZeroDivisionError"),
    ],
)
def test_a_fold_that_is_wrong_is_named(fold: Any, what: str) -> None:
    model, x = build("gpt2"), inputs("gpt2")

    class Folding(Shift):
        pass

    Folding.fold = fold  # type: ignore[attr-defined]
    surgery.splice(model, Custom(lambda site: site.port("output").insert(Folding(), "x")))
    perturb(model)
    expected = logits(model, x)
    with pytest.raises(surgery.SpliceError, match=rf"method 'custom' at .*({what})"):
        surgery.merge(model)
    assert torch.equal(logits(model, x), expected)
