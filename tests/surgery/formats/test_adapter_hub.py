"""Adapters of AdapterHub's library, beside models in which the equations are written by hand.

The library itself does not install beside this transformers; the keys and configs are those of its
source, version 1.2.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import surgery
from tests.support.loralib_groups import LAYERS, by_hand, grouped
from tests.support.models import build, inputs, logits


@pytest.mark.parametrize(("version", "scale"), [("adapters.1.2.0", 3.0), ("adapters.1.0.1", 1.0)])
def test_a_lora_of_the_adapters_library(version: str, scale: float, tmp_path: Path) -> None:
    """Before 1.1.0 the library scaled by 1, whatever its config says."""
    pairs = grouped(LAYERS)
    names = {"A": 0, "B": 1}
    found = {f"{x}.loras.mine.lora_{n}": ab[i] for x, ab in pairs.items() for n, i in names.items()}
    save_file(found, tmp_path / "adapter.safetensors")
    own = {"architecture": "lora", "r": 2, "alpha": 6, "attn_matrices": ["q", "v"]}
    config = {"config": own, "name": "mine", "version": version}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = surgery.load(build("gpt2"), tmp_path)
    torch.testing.assert_close(logits(model, inputs("gpt2")), by_hand(pairs, scale))

    for change, match in (
        ({"use_gating": True}, "a gate or a product"),
        ({"architecture": "prefix_tuning"}, "arranged anew"),
        ({"r": 4}, "and r is 4"),
        ({"alpha": 0}, "alpha=0"),
    ):
        config = {"config": {**own, **change}, "name": "mine", "version": version}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(surgery.StoreError, match=match):
            surgery.load(build("gpt2"), tmp_path)


HOULSBY: dict[str, Any] = {
    "mh_adapter": True, "output_adapter": True, "reduction_factor": 8, "non_linearity": "swish",
    "original_ln_before": False, "original_ln_after": True, "residual_before_ln": True,
    "ln_before": False, "ln_after": False, "is_parallel": False, "scaling": 1.0, "phm_layer": False,
    "phm_dim": 4, "use_gating": False, "inv_adapter": None, "cross_adapter": False, "dropout": 0.0,
    "leave_out": [],
}  # fmt: skip


def bottlenecks(places: list[str]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "adapter_down.0.weight": (4, 32), "adapter_down.0.bias": (4,),
        "adapter_up.weight": (32, 4), "adapter_up.bias": (32,),
    }  # fmt: skip
    return {
        f"{place}.adapters.mine.{name}": torch.randn(shape, generator=generator) * 0.3
        for place in places
        for name, shape in shapes.items()
    }


def folder(path: Path, config: dict[str, Any], found: dict[str, Tensor]) -> Path:
    save_file(found, path / "adapter.safetensors")
    text = json.dumps({"config": config, "name": "mine", "version": "adapters.1.2.0"})
    (path / "adapter_config.json").write_text(text)
    return path


def a_of(found: dict[str, Tensor], place: str, h: Tensor, f: Any) -> Tensor:
    """A(h) of a place."""
    w = [found[f"{place}.adapters.mine.{n}"] for n in ("adapter_down.0.weight",
         "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias")]  # fmt: skip
    return f(h @ w[0].T + w[1]) @ w[2].T + w[3]


R = "roberta.encoder.layer"
PLACES = {  # the output projections, and where the library keeps the adapter behind each
    "roberta": {
        f"{R}.{i}.{x}.dense": f"{R}.{i}.{x}" for i in (0, 1) for x in ("attention.output", "output")
    },
    "gpt2": {
        f"transformer.h.{i}.{x}.c_proj": f"transformer.h.{i}.{y}_adapters"
        for i in (0, 1)
        for x, y in (("attn", "attention"), ("mlp", "output"))
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
@pytest.mark.parametrize("half", [False, True])
def test_bottlenecks_after_sub_layers(name: str, half: bool, tmp_path: Path) -> None:
    places = dict(list(PLACES[name].items())[:: 2 if half else 1])  # attention alone, or both
    found = bottlenecks(list(places.values()))
    by_equation = build(name)
    for module, place in places.items():

        def hook(_: Any, __: Any, h: Tensor, place: str = place) -> Tensor:
            return h + a_of(found, place, h, F.silu)

        by_equation.get_submodule(module).register_forward_hook(hook)
    case = inputs(name)
    model = surgery.load(build(name), folder(tmp_path, HOULSBY, found))
    torch.testing.assert_close(logits(model, case), logits(by_equation, case))
    assert not torch.allclose(logits(model, case), logits(build(name), case), atol=1e-3)


def test_bottlenecks_beside_the_ffn_of_a_post_norm_model(tmp_path: Path) -> None:
    places = {p: m for p, m in PLACES["roberta"].items() if "attention" not in p}
    found = bottlenecks(list(places.values()))
    config = {**HOULSBY, "mh_adapter": False, "is_parallel": True, "non_linearity": "relu",
              "scaling": 4.0}  # fmt: skip
    by_equation = build("roberta")
    for i, place in enumerate(places.values()):
        layer = by_equation.roberta.encoder.layer[i]
        kept: list[Tensor] = []
        layer.intermediate.register_forward_pre_hook(lambda _, x, kept=kept: kept.append(x[0]))

        def hook(_: Any, __: Any, h: Tensor, place: str = place, kept: Any = kept) -> Tensor:
            return h + 4 * a_of(found, place, kept.pop(), torch.relu)

        layer.output.dense.register_forward_hook(hook)
    model = surgery.load(build("roberta"), folder(tmp_path, config, found))
    case = inputs("roberta")
    torch.testing.assert_close(logits(model, case), logits(by_equation, case))


def test_what_has_another_mathematics_is_refused_by_name(tmp_path: Path) -> None:
    places = list(PLACES["gpt2"].values())
    found = bottlenecks(places)
    for change, match in (
        ({"original_ln_before": True}, "original_ln_before=True"),
        ({"phm_layer": True}, "phm_layer=True"),
        ({"inv_adapter": "nice"}, "inv_adapter='nice'"),
        ({"non_linearity": "gelu_new"}, "non_linearity='gelu_new'"),
        ({"scaling": "learned"}, "scaling='learned'"),
        ({"is_parallel": True}, "read what comes before their norm"),
        ({"architecture": "reft"}, "architecture is 'reft'"),
    ):
        with pytest.raises(surgery.StoreError, match=match):
            surgery.load(build("gpt2"), folder(tmp_path, {**HOULSBY, **change}, found))
    first = f"{places[0]}.adapters.mine.adapter_up.weight"
    for changed, match in (
        ({**found, first: torch.ones(32, 5)}, r"\(32, 5\)"),
        ({k: x for k, x in found.items() if k != first}, "lacks the tensors"),
        ({**found, "x.y": torch.ones(2)}, "is not named X.adapters.NAME.parameter"),
        ({**found, "x.adapters.mine.adapter_up.bias": torch.ones(2)}, "0 sites of this model"),
    ):
        with pytest.raises(surgery.StoreError, match=match):
            surgery.load(build("gpt2"), folder(tmp_path, HOULSBY, changed))
