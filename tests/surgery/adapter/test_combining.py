"""combine makes one splice of several; its sums are PEFT's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery.adapter.combining import _drawn
from tests.support.models import build, inputs, logits, perturb

GIVEN = inputs("llama")
PORTS = ("query", "value")
ALPHAS = (3, 7, 2)  # the signs that ties elects are those of A and B without them
HOWS: dict[str, dict[str, Any]] = {
    "linear": {}, "cat": {}, "svd": {"rank": 3}, "magnitude": {"density": 0.5},
    "ties": {"density": 0.5},
}  # fmt: skip
THEIRS = {"magnitude": "magnitude_prune"}


def three(
    ranks: tuple[int, ...] = (2, 2, 2), model: Any = None, alphas: tuple[float, ...] = (3, 3, 3)
) -> Any:
    model = model or build("llama")
    for name, rank, alpha in zip("abc", ranks, alphas, strict=True):
        method = surgery.method("lora", rank=rank, ports=PORTS, alpha=alpha)
        surgery.splice(model, method, name=name)
    perturb(model, 0.3)
    return model


def of_peft(model: Any, ranks: tuple[int, ...]) -> Any:
    """The same adapters in a PEFT model."""
    first, *others = [config(rank, alpha) for rank, alpha in zip(ranks, ALPHAS, strict=True)]
    theirs = peft.get_peft_model(build("llama"), first, adapter_name="a")
    for name, other in zip("bc", others, strict=True):
        theirs.add_adapter(name, other)
    for name in "abc":
        for layer in range(2):
            own = model.model.layers[layer].self_attn
            there = theirs.base_model.model.model.layers[layer].self_attn
            for ours, projection in {"query": there.q_proj, "value": there.v_proj}.items():
                module = own.get_submodule(f"{name}_lora_{ours}")
                projection.lora_A[name].weight.data.copy_(module.a)
                projection.lora_B[name].weight.data.copy_(module.b.T)
    return theirs


def config(rank: int, alpha: float) -> Any:
    return peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q_proj", "v_proj"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.few(3)
def test_sums_are_those_of_peft(how: Any) -> None:
    ranks = (2, 3, 1) if how in ("cat", "svd") else (2, 2, 2)
    model, weights = three(ranks, alphas=ALPHAS), {"a": 0.7, "b": -0.4, "c": 1.1}
    theirs = of_peft(model, ranks)
    before = logits(model, GIVEN)
    surgery.combine(model, weights, "new", how=how, **HOWS[how])
    assert torch.equal(logits(model, GIVEN), before)
    options = {"svd_rank" if k == "rank" else k: v for k, v in HOWS[how].items()}
    theirs.add_weighted_adapter(
        [*weights], [*weights.values()], "new", combination_type=THEIRS.get(how, how), **options
    )
    theirs.set_adapter("new")
    with surgery.using(model, "new"):
        found = logits(model, GIVEN)
    torch.testing.assert_close(found, logits(theirs, GIVEN), rtol=1e-4, atol=1e-5)


@given(st.lists(st.floats(-2, 2), min_size=3, max_size=3))
def test_cat_and_a_full_svd_are_the_splices_at_their_factors(weights: list[float]) -> None:
    layer, x = nn.Sequential(nn.Linear(8, 6)).double(), torch.randn(2, 8, dtype=torch.float64)
    for name, rank in zip("abc", (1, 2, 3), strict=True):
        surgery.splice(layer, surgery.method("lora", rank=rank), name=name, example_inputs=x)
    perturb(layer, 0.5)
    chosen = dict(zip("abc", weights, strict=True))
    with surgery.using(layer, chosen):
        expected = layer(x)
    for how, options in {"cat": {}, "svd": {"rank": 6}}.items():
        surgery.combine(layer, chosen, how, how=how, **options)  # type: ignore[arg-type]
        with surgery.using(layer, how):
            torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


def test_values_drawn_at_random_have_the_mean_of_all_and_full_density_is_linear() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 50)
    mean = torch.stack([_drawn(x, 0.4) for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, x, rtol=0, atol=0.25)
    model = three()
    surgery.combine(model, "abc", "linear")
    for how in ("magnitude", "dare"):
        surgery.combine(model, "abc", how, how=how, density=1.0)
        with surgery.using(model, how):
            found = logits(model, GIVEN)
        with surgery.using(model, "linear"):
            assert torch.equal(found, logits(model, GIVEN))


@pytest.mark.parametrize("method", ["prefix", "inducer", "ffn_adapter", "ia3"])
def test_any_method_is_averaged_and_saved(method: str, tmp_path: Path) -> None:
    model = build("llama")
    for name in "ab":
        surgery.splice(model, surgery.method(method), name=name)
    perturb(model)
    surgery.combine(model, {"a": 0.25, "b": 0.75}, "mean", how="average")
    named = {n: dict(_of(model, n)) for n in ("a", "b", "mean")}
    for key, value in named["mean"].items():
        torch.testing.assert_close(value, 0.25 * named["a"][key] + 0.75 * named["b"][key])
    surgery.save(model, tmp_path / "mean", only="mean")
    with surgery.using(model, "mean"):
        expected = logits(model, GIVEN)
    fresh = build("llama")
    surgery.load(fresh, tmp_path / "mean")
    assert torch.equal(logits(fresh, GIVEN), expected)


def _of(model: Any, name: str) -> Any:
    for key, parameter in surgery.spliced_parameters(model, name):
        yield key.replace(f"{name}_", ""), parameter


@pytest.fixture(scope="module")
def uneven() -> Any:
    """Splices of several ranks, scales and methods, and the outputs, which no refusal changes."""
    model = three((2, 2, 3))
    surgery.splice(model, surgery.method("prefix", length=2), name="prefix")
    loud = [dataclasses.replace(m, alpha=99.0) for m in surgery.splicer.reports(model)["a"].methods]
    surgery.splice(model, loud, name="loud")
    return model, logits(model, GIVEN)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ({"a": 1.0, "z": 1.0}, {}, "nothing named 'z'"),
        ("ab", {"how": "best"}, "is none of linear"),
        ("ab", {"how": "ties"}, "needs density"),
        ("ab", {"how": "ties", "density": 0.0}, "needs density"),
        ("ab", {"density": 0.5}, "takes no density"),
        ("ab", {"rank": 3}, "takes no rank"),
        ("ab", {"how": "svd", "rank": 0}, "integer >= 1"),
        ({"a": float("nan")}, {}, "not finite"),
        ("abc", {}, "needs one rank"),
        ("abc", {"how": "average"}, "differ in their options"),
        (["a", "prefix"], {"how": "average"}, "differ in their methods"),
        (["prefix"], {"how": "cat"}, "no plain low-rank product"),
        (["a", "a"], {}, "has a splice twice"),
        (["a", "loud"], {"how": "average"}, "differ in their options"),
    ],
)
def test_what_cannot_be_combined_is_refused(
    uneven: Any, names: Any, options: Any, message: str
) -> None:
    model, before = uneven
    with pytest.raises(surgery.SpliceError, match=message):
        surgery.combine(model, names, "new", **options)
    assert torch.equal(logits(model, GIVEN), before)
    assert "new" not in surgery.summary(model).states
