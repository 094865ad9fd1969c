"""Tests of LoRA against dense weights, PEFT and the papers' counts."""

from __future__ import annotations

import copy
import re
import time
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

import surgery
from tests.support.models import (
    build,
    gpt2_small,
    inputs,
    logits,
    losses_of_training,
    perturb,
    qwen_half_billion,
    roberta_base,
)
from tests.support.weights_by_port import (
    IDS,
    MODELS,
    QKV,
    gpt2,
    llama,
    neox,
    roberta,
)

PORTS = [("query",), ("key",), ("value",), ("output",), ("up",), ("query", "value")]
PORTS += [("query", "key", "value", "output", "up")]
CASES = [(name, ports) for name in MODELS for ports in PORTS] + [("llama", ("gate",))]


def lora(**options: Any) -> surgery.Method:
    return surgery.method("lora", **options)


def randomised(model: PreTrainedModel, method: surgery.Method) -> Any:
    """Splice parameters that do something."""
    report = surgery.splice(model, method)
    with torch.no_grad():
        for _, parameter in surgery.spliced_parameters(model):
            parameter.normal_(std=0.5)
    return report


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("name", "ports"), CASES)
@pytest.mark.few(20)
def test_lora_equals_dense_weights_on_every_port(
    name: str, ports: tuple[str, ...], bias: bool
) -> None:
    torch.manual_seed(0)
    build, parts = MODELS[name]
    model = build().double()
    dense = copy.deepcopy(model)
    report = randomised(model, lora(rank=3, alpha=12.0, ports=ports, bias=bias))
    with torch.no_grad():
        for inserted in report.inserted:
            update, site = model.get_submodule(inserted.path), inserted.site
            found = parts(dense, site.layer)[inserted.edit.port]
            weight, shift = found[-1 if site.kind == "ffn" else 0]
            change = 12.0 / 3 * (update.a.T @ update.b)
            weight += change.reshape(weight.shape)
            if bias:
                shift += 12.0 / 3 * update.bias.reshape(shift.shape)
    with torch.no_grad():
        ours, theirs = model(input_ids=IDS)[0], dense(input_ids=IDS)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


heads_met: list[tuple[Tensor, Tensor, Tensor]] = []


def spy(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
    """SDPA that keeps the heads that reach it."""
    heads_met.append((q.detach(), k.detach(), v.detach()))
    return sdpa_attention_forward(module, q, k, v, *rest, **options)


AttentionInterface.register("spy", spy)
AttentionMaskInterface.register("spy", sdpa_mask)


@pytest.mark.parametrize("asked", [("query",), ("key",), ("value",), ("query", "value")])
@pytest.mark.parametrize("build", [gpt2, neox])
def test_only_the_asked_slices_of_a_fused_projection_change(
    build: Callable[..., PreTrainedModel], asked: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    model = build(attn_implementation="spy")
    model(input_ids=IDS)
    heads_met.clear()
    model(input_ids=IDS)
    base = dict(zip(QKV, heads_met[0], strict=True))
    randomised(model, lora(ports=asked))
    model(input_ids=IDS)
    heads_met.clear()
    model(input_ids=IDS)
    tuned = dict(zip(QKV, heads_met[0], strict=True))
    for name in QKV:
        if name in asked:
            assert ((tuned[name] != base[name]).flatten(2).any(-1)).all()
        else:
            assert torch.equal(tuned[name], base[name])


@pytest.mark.parametrize(
    ("build", "targets"), [(llama, ("q_proj", "v_proj")), (roberta, ("query", "value"))]
)
def test_lora_equals_peft_with_the_same_tensors(
    build: Callable[..., PreTrainedModel], targets: tuple[str, str]
) -> None:
    torch.manual_seed(0)
    model = build()
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=[*targets], init_lora_weights=False)
    with warnings.catch_warnings():  # PEFT asks transformers for a name that is deprecated
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(model), config)
    report = surgery.splice(model, lora(rank=4, alpha=10.0))
    tensors = theirs.state_dict()
    with torch.no_grad():
        for inserted in report.inserted:
            target = targets[("query", "value").index(inserted.edit.port)]
            place = f".{inserted.site.layer}."
            a, b = (
                next(t for n, t in tensors.items() if place in n and f"{target}.lora_{x}" in n)
                for x in "AB"
            )
            update = model.get_submodule(inserted.path)
            update.a.copy_(a)
            update.b.copy_(b.T)
        ours, expected = model(input_ids=IDS)[0], theirs(input_ids=IDS)[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("build", "options", "count"),
    [
        (gpt2_small, {"rank": 54, "bias": True}, 2_009_088),
        pytest.param(gpt2_small, {"rank": 54}, 1_990_656, marks=pytest.mark.slow),
        (gpt2_small, {"rank": 8}, 294_912),
        (roberta_base, {"rank": 16}, 589_824),
        pytest.param(qwen_half_billion, {"rank": 8}, 540_672, marks=pytest.mark.slow),
    ],
)
@pytest.mark.few(1)
def test_parameter_counts_are_those_of_the_papers(
    build: Callable[[], PreTrainedModel], options: dict[str, Any], count: int
) -> None:
    with torch.device("meta"):
        model = build()
    surgery.splice(model, lora(**options), example_inputs={"input_ids": IDS.to("meta")})
    assert surgery.summary(model).inserted == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"rank=0 is not possible. It must be an integer >= 1"),
        ({"rank": 1.5}, r"rank=1.5 is not possible"),
        ({"alpha": 0}, r"alpha=0 is not possible. It must be a number > 0"),
        ({"dropout": -0.1}, r"dropout=-0.1 is not possible"),
        ({"ports": ()}, r"ports=\(\) is not possible. It must be some of"),
        ({"ports": ["qeury"]}, r"no projection port 'qeury'. Did you mean 'query'\?"),
        ({"rnak": 4}, r"no option 'rnak'. Did you mean 'rank'\?"),
    ],
)
def test_bad_options_are_named_with_what_they_must_be(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(surgery.SurgeryError, match=message):
        lora(**options)


SOON = [
    "layers.0.", r"layers\.(0|1|12)\.", r".*\.\d+\.self_attn\..*", r"\.\d+\.mlp\.e\.\d+\.w\d+$",
    "[(*+]*", r"\(a\)+", "(?:mlp)?", "a{2,3}",
]  # fmt: skip
LATE = [
    r"(.*.*)*\d$", "(a|a)*b", "(?:a+)+$", "(.|.)" * 30 + "$", ".*.*.*.*$", r"(.)\1", "(?=a*)",
    "(a){2}", "(?i)a", ".?" * 20,
]  # fmt: skip


@pytest.mark.parametrize("pattern", SOON + LATE)
def test_a_pattern_that_could_search_for_long_is_refused(pattern: str) -> None:
    if pattern in SOON:
        assert lora(ranks={pattern: 4}).ranks == {pattern: 4}
    else:
        with pytest.raises(surgery.MethodError, match="expressions that end soon"):
            lora(ranks={pattern: 4})


@pytest.mark.slow
def test_the_slowest_patterns_that_are_accepted_end_soon() -> None:
    slow = {f"{'.*' * 3}{i}$": 4 for i in range(9)}
    path, start = "model.layers.31.self_attn.a_name_of_sixty_characters_in_all__", time.monotonic()
    for pattern in lora(ranks=slow).ranks:
        re.search(pattern, path)
    assert time.monotonic() - start < 5


def test_a_wrong_name_of_the_method_is_corrected() -> None:
    with pytest.raises(surgery.MethodError, match=r"Did you mean 'lora'\?"):
        surgery.method("lroa")


def test_a_port_that_a_model_lacks_is_refused_and_nothing_changes() -> None:
    model = gpt2()
    with pytest.raises(surgery.SiteError, match=r"for none of these 4 sites.*ports .*activation"):
        surgery.splice(model, lora(ports=("gate",)))
    assert type(model.transformer.h[0].mlp).__name__ == "GPT2MLP"
    assert not any("lora" in name for name, _ in model.named_modules())


def test_sites_without_a_port_are_left_out_and_named() -> None:
    model = gpt2()
    sites = surgery.locate(model)
    sites[0].ports.pop("value")
    report = surgery.splice(model, lora(), at=sites.attention)
    assert len(report.inserted) == 2 * len(sites.attention) - 1
    assert report.left_out == ["lora at transformer.h.0.attn: value"]
    assert "left out, for want of a port: lora at transformer.h.0.attn: value" in repr(report)


def test_lora_learns() -> None:
    torch.manual_seed(0)
    model = gpt2(initializer_range=0.5)
    surgery.splice(model, lora(rank=4, ports=("query", "value", "up", "output")))
    surgery.freeze_base(model)
    losses = losses_of_training(model, IDS, 0.02)
    assert losses[-1] < losses[0] / 10


def test_hooks_see_the_update_alone() -> None:
    model = build("gpt2")
    case = inputs("gpt2")
    before = logits(model, case)
    surgery.splice(model, surgery.method("lora", rank=2))
    perturb(model)
    assert not torch.equal(logits(model, case), before)
    own = [m for m in model.modules() if type(m).__name__ == "LowRank"]
    handles = [m.register_forward_hook(lambda _m, _given, out: torch.zeros_like(out)) for m in own]
    assert torch.equal(logits(model, case), before)
    for handle in handles:
        handle.remove()
    assert not torch.equal(logits(model, case), before)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("onto", [torch.bfloat16, torch.float32, None])
def test_autocast_keeps_the_dtype_of_the_port(bias: bool, onto: torch.dtype | None) -> None:
    model = gpt2().eval()
    report = surgery.splice(model, lora(rank=2, ports=("value",), bias=bias))
    update = model.get_submodule(report.inserted[0].path)
    x = torch.randn(1, 3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = None if onto is None else torch.randn(1, 3, 16, dtype=onto)
        assert update(x, onto=y).dtype == (onto or torch.bfloat16)
        cache = model(input_ids=IDS, use_cache=True).past_key_values
    layer = cache.layers[0]
    assert layer.keys.dtype == layer.values.dtype == torch.bfloat16


def test_the_parts_of_a_fused_projection_share_a_and_merge() -> None:
    model, case = build("gpt2"), inputs("gpt2")
    options = {"rank": 2, "ports": ("query", "key", "value"), "fused": True}
    report = surgery.splice(model, surgery.method("lora", **options))
    parts = [model.get_submodule(i.path) for i in report.inserted[:3]]
    assert parts[0].a is parts[1].a is parts[2].a
    assert sum(i.parameters for i in report.inserted) == 2 * 2 * (32 + 96)
    perturb(model)
    expected = logits(model, case)
    surgery.merge(model)
    torch.testing.assert_close(logits(model, case), expected)


def test_ranks_and_alphas_by_the_names_of_modules() -> None:
    model = build("llama")
    options = {"ranks": {"q_proj": 3, "mlp": 4}, "alphas": {r"layers\.1\..*v_proj": 2.0}}
    surgery.splice(model, surgery.method("lora", rank=2, alpha=8.0, ports="all", **options))
    for layer in model.model.layers:
        assert layer.self_attn.lora_query.a.shape[0] == 3
        assert layer.self_attn.lora_value.a.shape[0] == 2
        assert layer.mlp.lora_up.a.shape[0] == 4
    scales = [layer.self_attn.lora_value.scale for layer in model.model.layers]
    assert scales == [4.0, 1.0]
    with pytest.raises(surgery.MethodError, match="numbers > 0"):
        surgery.method("lora", alphas={"q": 0.0})
