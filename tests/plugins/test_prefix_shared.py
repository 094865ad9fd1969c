"""Tests of reparametrised prefixes, NoRGa, NTK-Attention and the position shift."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import surgery
from tests.support.heads_by_hand import IDS, close, gpt2, projections
from tests.support.models import build, gpt2_small, inputs, logits, perturb, qwen_half_billion
from tests.support.peft_prefixes import beside_peft

SHARES = ["simple", "linear", "layer", "global"]


def formula(share: str, model: Any, layer: int) -> tuple[Tensor, Tensor]:
    """P_k and P_v of GPT-2's layer, (P, D) each, from the papers' formulas."""
    block = model.transformer.h[layer]
    made = block.attn.prefix_merged.made
    first = model.transformer.h[0].attn.prefix_merged.made
    rows = (first if share == "global" else made).rows.rows
    if share == "simple":
        x = block.ln_1(rows)
        weight, bias = block.attn.c_attn.weight, block.attn.c_attn.bias
        width = rows.shape[1]
        both = x @ weight + bias
        return both[:, width : 2 * width], both[:, 2 * width :]
    out = made.outward
    if share == "linear":
        return torch.tanh(rows @ out.weight.T + out.bias).chunk(2, -1)
    inward = (first if share == "global" else made).rows.inward
    hidden = torch.tanh(rows @ inward.weight.T + inward.bias)
    return (hidden @ out.weight.T + out.bias).chunk(2, -1)


@pytest.mark.parametrize("share", SHARES)
def test_keys_and_values_are_what_the_formulas_say(share: str) -> None:
    model = build("gpt2").double()
    surgery.splice(model, surgery.method("prefix", length=3, share=share, hidden=5, std=0.5))
    perturb(model)
    for layer in (0, 1):
        keys, values = formula(share, model, layer)
        ours = model.transformer.h[layer].attn.prefix_merged.tables()
        for a, b in zip(ours, (keys, values), strict=True):  # (H, P, d) against (P, H d)
            close(a, b.unflatten(-1, (4, 8)).transpose(0, 1), 1e-12)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "roberta", "plain"])
@pytest.mark.few(5)
def test_a_saved_one_is_plain_and_gives_the_same(name: str, share: str, tmp_path: Any) -> None:
    model, case = build(name), inputs(name)
    options = {"length": 3, "share": share, "hidden": 5, "std": 0.5}
    surgery.splice(model, surgery.method("prefix", **options), example_inputs=case)
    perturb(model)
    expected = logits(model, case)
    surgery.save(model, tmp_path / "plain")
    loaded = surgery.load(build(name), tmp_path / "plain", case)
    assert torch.equal(logits(loaded, case), expected)
    summary = surgery.summary(loaded)
    assert summary.reports[0].methods[0] == surgery.method("prefix", **options).plain()
    assert summary.inserted == surgery.summary(model).stored
    surgery.save(model, tmp_path / "all", plain=False)
    again = surgery.load(build(name), tmp_path / "all", case)
    assert torch.equal(logits(again, case), expected)
    assert surgery.summary(again).inserted == surgery.summary(model).inserted


def test_without_gradient_the_tables_are_made_once_and_never_stale() -> None:
    model = build("gpt2")
    surgery.splice(model, surgery.method("prefix", length=3, share="global", hidden=5))
    prefix = model.transformer.h[1].attn.prefix_merged
    with torch.no_grad():
        first = prefix.tables()
        assert prefix.tables()[0] is first[0]
        perturb(model)  # the trunk is registered at layer 0
        assert not torch.equal(prefix.tables()[0], first[0])
    assert prefix.tables()[0].requires_grad


@pytest.mark.parametrize("method", ["prefix", "norga"])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.few(5)
def test_a_plain_forward_reads_nothing_that_autocast_has_lowered(share: str, method: str) -> None:
    """What is kept, and what is saved, has the dtype of the parameters."""
    model = build("gpt2")
    surgery.splice(model, surgery.method(method, length=3, share=share, hidden=5))
    perturb(model)
    given = inputs("gpt2")
    with torch.no_grad():
        before = logits(copy.deepcopy(model), given)
        with torch.autocast("cpu", torch.bfloat16):
            lowered = logits(model, given)
            stored = model.transformer.h[0].attn.get_submodule(f"{method}_merged").plain_state()
        assert torch.equal(logits(model, given), before)
        assert not torch.equal(lowered, before)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "base", "trained", "stored"),
    [
        ({"length": 108, "share": "global"}, gpt2_small, 9_932_288, 1_990_656),
        pytest.param(
            {"length": 5, "share": "global"}, gpt2_small, 9_853_184, 92_160, marks=pytest.mark.slow
        ),
        ({"length": 10, "share": "layer", "hidden": 48}, gpt2_small, 1_438_272, 184_320),
        ({"length": 10, "share": "simple"}, gpt2_small, 92_160, 184_320),
        pytest.param(
            {"length": 20, "share": "global"},
            qwen_half_billion,
            3_629_056,
            122_880,
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.few(1)
def test_counts_to_train_and_to_store(options: Any, base: Any, trained: int, stored: int) -> None:
    with torch.device("meta"):
        model = base()
    surgery.splice(model, surgery.method("prefix", **options))
    summary = surgery.summary(model)
    assert (summary.inserted, summary.stored) == (trained, stored)
    assert "stored" in repr(summary)


def test_a_shifted_one_equals_peft_as_it_is() -> None:
    model, theirs = beside_peft(shift=True)
    close(model(input_ids=IDS).logits, theirs(input_ids=IDS).logits, 5e-6)


def test_a_shift_is_refused_where_there_are_no_positions() -> None:
    model, case = build("vit"), inputs("vit")
    with pytest.raises(surgery.SiteError, match="encodes positions by number"):
        surgery.splice(model, surgery.method("prefix", shift=True), example_inputs=case)
    assert not any("prefix" in name for name, _ in model.named_modules())


def by_loop(kind: str, q: Tensor, k: Tensor, v: Tensor, m: Any) -> Tensor:
    """Causal attention with what the method adds, head by head and query by query."""
    batch, heads, n, d = q.shape
    out = torch.zeros(batch, heads, n, d, dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(n):
                weights = torch.stack(
                    [(q[b, h, i] @ k[b, h, j] / math.sqrt(d)).exp() for j in range(i + 1)]
                )
                values = v[b, h, : i + 1]
                if kind == "norga":
                    own = q[b, h, i] @ m.keys[h].T / math.sqrt(d)
                    own = (own + m.tau[1] * torch.tanh(m.tau[0] * own)).exp()
                    total = weights.sum() + own.sum()
                    out[b, h, i] = (weights @ values + own @ m.values[h]) / total
                else:
                    x = q[b, h, i] / d**0.25
                    phi = torch.where(x > 0, x + 1, x.exp())
                    total = weights.sum() + phi @ m.k[h].abs()
                    out[b, h, i] = (weights @ values + phi @ m.z[h]) / total
    return out


@pytest.mark.parametrize("kind", ["norga", "ntk_attention"])
def test_they_equal_a_loop_from_the_equation(kind: str) -> None:
    torch.manual_seed(0)
    model = gpt2(initializer_range=0.3).double().eval()
    attn = model.transformer.h[0].attn
    met: dict[str, Any] = {}
    attn.register_forward_hook(lambda m, args, y: met.update(x=args[0].detach(), y=y[0]))
    options = {"length": 3} if kind == "norga" else {}
    surgery.splice(model, surgery.method(kind, **options))
    perturb(model, 0.5)
    model(input_ids=IDS)
    q, k, v, wo, bo = projections(attn, met["x"])
    f = by_loop(kind, q, k, v, attn.get_submodule(f"{kind}_merged"))
    close(met["y"], f.transpose(1, 2).flatten(2) @ wo + bo, 1e-9)


def test_the_mass_of_ntk_attention_trains_from_zero() -> None:
    """The release's |k| has derivative 0 at its own start."""
    model = build("gpt2")
    surgery.splice(model, surgery.method("ntk_attention"))
    logits(model, inputs("gpt2")).square().sum().backward()
    own = {n: p for n, p in surgery.spliced_parameters(model) if n.endswith(".k")}
    assert all(bool((p == 0).all()) and bool((p.grad != 0).all()) for p in own.values())


def test_counts_of_norga_and_ntk_attention() -> None:
    for options, count in (({}, 599_040), ({"length": 10}, 184_320 + 24)):
        with torch.device("meta"):
            model = gpt2_small()
        name = "norga" if options else "ntk_attention"
        surgery.splice(model, surgery.method(name, **options))
        assert surgery.summary(model).inserted == count


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"share": "deep"}, "share='deep' .* one of none, simple, linear, layer, global"),
        ({"share": "layer", "std": 0}, "a number > 0 where keys and values are made of rows"),
        ({"hidden": 0}, "hidden=0 .* an integer >= 1"),
        ({"shift": 1}, "shift=1 .* True or False"),
    ],
)
def test_bad_options_are_named(chosen: Any, message: str) -> None:
    with pytest.raises(surgery.MethodError, match=message):
        surgery.method("prefix", **chosen)


def test_a_shared_prefix_follows_the_weights_that_it_is_made_with() -> None:
    x, model = inputs("gpt2"), build("gpt2")
    surgery.splice(model, surgery.method("prefix", share="simple", std=0.5))
    logits(model, x)
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight.mul_(1.5)
    now = logits(model, x)
    for module in model.modules():
        vars(module).pop("_known", None) and setattr(module, "_known", None)
    assert torch.equal(now, logits(copy.deepcopy(model), x))
