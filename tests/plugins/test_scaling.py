"""Tests of the methods that scale or shift: (IA)^3, SSL, SSB and BitFit."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch

import surgery
from tests.support.models import (
    build,
    gpt2_small,
    inputs,
    logits,
    losses_of_imitation,
    perturb,
    roberta_base,
)
from tests.support.weights_by_port import MODELS, QKV


def dense(name: str, method: surgery.Method) -> tuple[Any, Any]:
    """A spliced model with random parameters, and the base with the same done to its weights."""
    torch.manual_seed(0)
    make, parts = MODELS[name]
    model = make().double()
    base = copy.deepcopy(model)
    report = surgery.splice(model, method)
    perturb(model, 0.5)
    with torch.no_grad():
        for i in report.inserted:
            module, port = model.get_submodule(i.path), i.edit.port
            if i.site.kind == "norm":
                base.get_submodule(i.site.path).bias += module.delta
                continue
            weight, shift = parts(base, i.site.layer)[port][-1 if i.site.kind == "ffn" else 0]
            heads = weight.shape[1:]  # of a fused projection: (H, d)
            if hasattr(module, "delta"):
                shift += module.delta.reshape(heads)
            elif hasattr(module, "c"):
                weight *= module.c.reshape(heads)
            elif hasattr(module, "a"):
                weight *= module.a.reshape(-1, *[1] * len(heads))
            elif port in QKV:
                weight *= module.scale.reshape(heads)
                shift *= module.scale.reshape(heads)
            else:
                weight *= module.scale.unsqueeze(-1)
    return model, base


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ia3", {}),
        ("ssl", {}),
        ("ssb", {}),
        ("ssb", {"ports": ("query", "up", "output")}),
        ("bitfit", {}),
    ],
)
@pytest.mark.few(12)
def test_it_equals_dense_weights(name: str, method: str, options: dict[str, Any]) -> None:
    if name == "neox" and method == "ia3":
        options = {"ports": ("key", "value", "output")}
    model, base = dense(name, surgery.method(method, **options))
    ids = torch.arange(10).reshape(2, 5) * 7 % 27 + 3
    with torch.no_grad():
        ours, theirs = model(input_ids=ids)[0], base(input_ids=ids)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_ia3_equals_peft_with_the_same_tensors() -> None:
    model, case = build("llama"), inputs("llama")
    targets = ["k_proj", "v_proj", "down_proj"]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=["down_proj"])
    with warnings.catch_warnings():  # PEFT asks transformers for a name that is deprecated
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(model), config)
    report = surgery.splice(model, surgery.method("ia3"))
    tensors = {n: p for n, p in theirs.named_parameters() if "ia3_l" in n}
    assert len(tensors) == len(report.inserted)
    with torch.no_grad():
        for i in report.inserted:
            name = {"key": "k_proj", "value": "v_proj", "output": "down_proj"}[i.edit.port]
            own = next(t for n, t in tensors.items() if f".{i.site.layer}." in n and name in n)
            own.normal_(1, 0.5)
            model.get_submodule(i.path).scale.copy_(own.flatten())
    expected = theirs(**case).logits
    torch.testing.assert_close(logits(model, case), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("base", "method", "count"),
    [
        (gpt2_small, "bitfit", 102_144),
        pytest.param(roberta_base, "bitfit", 102_144, marks=pytest.mark.slow),
        pytest.param(gpt2_small, "ssl", 36_864, marks=pytest.mark.slow),
        (gpt2_small, "ssb", 73_728),
        (gpt2_small, "ia3", 12 * (2 * 768 + 3072)),
    ],
)
@pytest.mark.few(1)
def test_parameter_counts_are_those_of_the_papers(base: Any, method: str, count: int) -> None:
    with torch.device("meta"):
        model = base()
    surgery.splice(model, surgery.method(method))
    assert surgery.summary(model).inserted == surgery.summary(model).stored == count


def test_bitfit_reaches_every_bias_of_the_body() -> None:
    model = build("roberta")
    surgery.splice(model, surgery.method("bitfit"))
    count = sum(p.numel() for n, p in model.roberta.named_parameters() if n.endswith(".bias"))
    inserted = surgery.summary(model).inserted
    assert inserted == count


def test_bitfit_without_a_bias_says_so() -> None:
    with pytest.raises(surgery.SiteError, match="it needs a projection or a norm that has a bias"):
        surgery.splice(build("llama"), surgery.method("bitfit"))


def test_bitfit_of_some_layers_takes_their_norms_along() -> None:
    model = build("gpt2")
    report = surgery.splice(model, surgery.method("bitfit"), at=surgery.locate(model).layers(1, 2))
    assert {i.site.layer for i in report.inserted} == {1}
    assert {i.site.kind for i in report.inserted} == {"attention", "ffn", "norm"}


@pytest.mark.parametrize("name", ["gpt2", "roberta"])
@pytest.mark.few(1)
def test_a_list_with_sites_of_every_kind_is_loaded_in_its_order(name: str, tmp_path: Any) -> None:
    model, case = build(name), inputs(name)
    listed = [
        surgery.method("lora", ports=("up",)),
        surgery.method("bitfit"),
        surgery.method("ffn_adapter", rank=2, placement="block"),
        surgery.method("prompt", length=2),
        surgery.method("ia3"),
    ]
    surgery.splice(model, listed)
    perturb(model)
    surgery.save(model, tmp_path)
    loaded = surgery.load(build(name), tmp_path)
    assert torch.equal(logits(loaded, case), logits(model, case))


@pytest.mark.parametrize("method", ["ia3", "ssl", "ssb", "bitfit"])
@pytest.mark.few(2)
def test_it_learns_what_another_of_its_kind_does(method: str) -> None:
    losses = losses_of_imitation("gpt2", surgery.method(method), 0.02)
    assert losses[-1] < losses[0] / 10


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ia3", {"ports": ("query",)}, "some of key, value, output"),
        ("ssl", {"ports": ()}, "some of gate, key, output"),
        ("ssb", {"ports": ("keys",)}, "some of gate, key, output"),
    ],
)
def test_bad_options_are_named(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(surgery.MethodError, match=message):
        surgery.method(method, **options)
