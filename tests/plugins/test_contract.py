"""Every built-in method keeps the contract, and the summary matrix of the papers' methods holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import surgery
from surgery.host.state import hosts
from surgery.testing import LAWS, check_method, make_model
from tests.support.models import perturb

IDS = torch.arange(14).reshape(2, 7) * 5 % 40 + 3

CASES: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"rank": 4, "bias": True}),
]
# Other methods and options on every model: the slow tier.
MORE: list[tuple[str, dict[str, Any]]] = [
    ("inducer", {"key_rank": 3, "value_rank": 4}),
    ("prefix", {"length": 3, "gate": True}),
    ("prompt", {"length": 3}),
    ("ffn_adapter", {"rank": 4, "placement": "pfeiffer", "dropout": 0.1}),
    ("lora", {"ports": ("up", "output"), "rslora": True, "dropout": 0.1, "ranks": {r"\.0\b": 3}}),
    ("dora", {"ports": "all", "fused": True, "dropout": 0.1, "ranks": {r"\.0\b": 3}}),
    ("inducer", {"key_rank": 0, "value_rank": 4, "dropout": 0.1}),
    ("inducer", {"key_rank": 0, "value_rank": 4, "variant": "adaptive"}),
    ("inducer", {"key_rank": 3, "value_rank": 4, "init": "paper"}),
    ("prefix", {"length": 3, "std": 0.5}),
    ("prefix", {"length": 3, "shift": True}),
    ("prefix", {"length": 3, "share": "simple", "dropout": 0.1}),
    ("prefix", {"length": 3, "share": "linear"}),
    ("prefix", {"length": 3, "share": "layer", "hidden": 6}),
    ("prefix", {"length": 3, "share": "global", "hidden": 6, "gate": True}),
    ("prompt", {"length": 3, "encoder": "mlp", "hidden": 6}),
    ("prompt", {"length": 3, "encoder": "ptuning", "hidden": 6, "init": "normal"}),
    ("ffn_adapter", {"rank": 4, "placement": "houlsby", "init": "normal"}),
    ("ffn_adapter", {"rank": 4, "placement": "attention", "layer_norm": True}),
    ("ffn_adapter", {"rank": 4, "placement": "parallel", "scale": "learned"}),
]
# On one model by default, on all three in the slow tier.
ONE_MODEL: list[tuple[str, dict[str, Any]]] = [
    ("inducer", {"key_rank": 3, "value_rank": 4}),
    ("prefix", {"length": 3, "gate": True}),
    ("prompt", {"length": 3}),
    ("ffn_adapter", {"rank": 4, "placement": "pfeiffer", "dropout": 0.1}),
    ("inducer", {"key_rank": 3, "value_rank": 4, "variant": "gating"}),
    ("norga", {"length": 3}),
    ("ntk_attention", {}),
    ("ffn_adapter", {"rank": 4, "placement": "block", "layer_norm": True}),
    ("dora", {"rank": 4}),
    ("bitfit", {}),
    ("ia3", {}),
    ("ssl", {}),
    ("full", {}),
    ("tokens", {"tokens": tuple(range(3, 20))}),
    ("ssb", {"ports": ("query", "value", "up", "output")}),
    ("transplant", {}),
    ("ablate", {"heads": (0, 2)}),
]
# Of methods that are above: the slow tier.
COMBINED: list[tuple[str, dict[str, Any]]] = [
    ("inducer_lora", {"key_rank": 2, "value_rank": 3, "lora_rank": 2}),
    ("mam_inducer", {"key_rank": 2, "value_rank": 3, "lora_rank": 2, "ffn_rank": 4}),
    ("mam_adapter", {"length": 3, "rank": 4}),
]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in MORE + ONE_MODEL[4:] + COMBINED]


@pytest.mark.parametrize(("name", "options"), [*CASES, *SLOW], ids=str)
def test_every_method_keeps_the_contract(name: str, options: dict[str, Any]) -> None:
    contract = check_method(surgery.method(name, **options))
    assert set(contract.refused) == ({"grouped"} if name == "bitfit" else set())
    for shape, laws in contract.held.items():
        assert len(laws) + len(contract.exempt.get(shape, {})) == len(LAWS)


@pytest.mark.parametrize(("name", "options"), ONE_MODEL, ids=str)
@pytest.mark.few(6)
def test_further_methods_keep_the_contract_on_one_model(name: str, options: dict[str, Any]) -> None:
    contract = check_method(surgery.method(name, **options), shapes=("fused",))
    assert len(contract.held["fused"]) == len(LAWS)


def test_every_built_in_is_among_the_cases() -> None:
    own = {n for n, c in surgery.methods().items() if c.__module__.startswith("surgery_plugins")}
    assert own == {name for name, _ in CASES + ONE_MODEL + COMBINED}


@dataclass(frozen=True)
class Row:
    """Can it start at the base? Does it change what layer 0 caches? How much of it merges?"""

    method: str
    options: dict[str, Any]
    identity: bool
    cache: bool
    merge: str


# A prefix holds its keys and values itself: "constant" in the papers' matrix, no entry of a cache.
MATRIX = [
    Row("inducer", {}, True, False, "b2"),
    Row("inducer", {"key_rank": 0}, True, False, "b2"),
    Row("inducer", {"key_rank": 0, "variant": "adaptive"}, True, False, "no"),
    Row("inducer", {"variant": "gating"}, False, False, "b2"),
    Row("lora", {"ports": ("query",)}, True, False, "yes"),
    Row("lora", {}, True, True, "yes"),
    Row("prefix", {}, False, False, "no"),
    Row("prefix", {"gate": True}, True, False, "no"),
    Row("prefix", {"share": "global"}, False, False, "no"),
    Row("norga", {}, False, False, "no"),
    Row("prompt", {}, False, True, "no"),
    Row("ffn_adapter", {"placement": "houlsby"}, True, False, "no"),
    Row("ffn_adapter", {"placement": "pfeiffer"}, True, False, "no"),
    Row("ffn_adapter", {"placement": "block"}, True, False, "no"),
    Row("ffn_adapter", {"placement": "parallel"}, True, False, "no"),
    Row("mam_adapter", {"length": 3, "rank": 4}, False, False, "no"),
    Row("mam_inducer", {}, True, False, "LoRA, b2"),
    Row("bitfit", {}, True, True, "yes"),
    Row("ntk_attention", {}, True, False, "no"),
    Row("ssl", {}, True, True, "yes"),
    Row("ssb", {}, True, True, "yes"),
    Row("ia3", {}, True, True, "yes"),
]


def cached(model: Any) -> list[torch.Tensor]:
    """Keys and values that layer 0 has cached after a forward."""
    layer = model(input_ids=IDS, use_cache=True).past_key_values.layers[0]
    return [layer.keys, layer.values]


@pytest.mark.parametrize("row", MATRIX, ids=str)
@pytest.mark.parametrize("shape", ["fused", "encoder", "grouped"])
@pytest.mark.few(22)
def test_the_matrix_of_identity_cache_and_merging(shape: str, row: Row) -> None:
    model, base = make_model(shape), make_model(shape)
    method = surgery.method(row.method, **row.options)
    if (row.method, shape) == ("bitfit", "grouped"):
        with pytest.raises(surgery.SiteError, match="needs a projection or a norm that has a bias"):
            surgery.splice(model, method)
        return
    with torch.no_grad():
        expected = base(input_ids=IDS).logits
        surgery.splice(model, method)
        assert torch.equal(model(input_ids=IDS).logits, expected) == row.identity
        assert (method.start != "none") == row.identity
        perturb(model)
        moved = model(input_ids=IDS).logits
        if shape != "encoder":
            pairs = zip(cached(model), cached(base), strict=True)
            assert all(a.shape == b.shape for a, b in zip(cached(model), cached(base), strict=True))
            assert any(not torch.equal(a, b) for a, b in pairs) == row.cache
    if row.merge == "yes":
        surgery.merge(model)
        assert not hosts(model)
    else:
        with pytest.raises(surgery.SpliceError, match=f"method '{row.method}'.*cannot be merged"):
            surgery.merge(model)
        biased = shape != "grouped"
        merged = surgery.merge(model, partial=True)
        folded = {i.edit.child.split("_")[0] for i in merged.folded}
        assert folded == ({"lora"} if "LoRA" in row.merge and biased else set())
        changed = bool(merged.originals)
        assert changed == (biased and row.merge != "no")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, moved, rtol=1e-4, atol=1e-5)


def test_a_method_that_breaks_the_contract_is_told_where() -> None:
    @dataclass(frozen=True)
    class Late(surgery.Method):
        """Reads the last token everywhere: a row is not what it is alone."""

        name = "late"
        kinds = ("ffn",)

        def splice(self, site: surgery.Site) -> None:
            site.port("output").add(Mean(site.width), name="late", reads=("output",))

    class Mean(torch.nn.Linear):
        def __init__(self, width: int) -> None:
            super().__init__(width, width)
            torch.nn.init.zeros_(self.weight)
            torch.nn.init.zeros_(self.bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.mean(0, keepdim=True).expand_as(x))

    with pytest.raises(AssertionError, match="padding and batch do not matter: a row in a"):
        check_method(Late())
