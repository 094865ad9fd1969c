"""Loading: damaged files and other bases are refused by name; adapters are loaded beside others."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery.adapter.training import kept_tensors
from tests.support.custom_methods import Custom, Shift, insert
from tests.support.models import build, inputs, logits, perturb
from tests.support.splices import built_with, untouched


def test_a_base_that_does_not_fit_is_named_with_sites_and_shapes(saved: Path) -> None:
    other = build("roberta", head_width=4)
    with pytest.raises(surgery.StoreError, match="head_width 8 in the adapter, 4 here"):
        surgery.load(other, saved)
    assert untouched(other)
    with pytest.raises(surgery.StoreError, match="no such attention site"):
        surgery.load(build("gpt2"), saved)
    shallow = build("roberta", depth=1)
    with pytest.raises(surgery.StoreError, match=r"layer\.1\.attention: no such"):
        surgery.load(shallow, saved)
    assert untouched(shallow)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "json", "none"])
def test_damaged_files_are_named(saved: Path, damage: str) -> None:
    tensors = next(saved.glob("*.safetensors"))
    data = tensors.read_bytes()
    if damage == "truncate":
        tensors.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        tensors.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "remove":
        tensors.unlink()
    elif damage == "json":
        (saved / "surgery.json").write_text('{"format": 1')
    else:
        (saved / "surgery.json").unlink()
    model = build("roberta")
    with pytest.raises(surgery.StoreError, match=str(saved)):
        surgery.load(model, saved)
    assert untouched(model)


def options_of(description: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = description["splices"][0]["methods"][0]["options"]
    return options


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no kept": lambda d: d.pop("kept"),
    "kept without a tensor": lambda d: d["kept"].append("transformer.wte.weight"),
    "kept is text": lambda d: d.update(kept="transformer"),
    "no base": lambda d: d.pop("base"),
    "no fingerprint": lambda d: d["base"].pop("fingerprint"),
    "no modules": lambda d: d["splices"][0].pop("modules"),
    "no path": lambda d: d["splices"][0]["sites"][0].pop("path"),
    "no splices": lambda d: d.update(splices=None),
    "options in a list": lambda d: d["splices"][0]["methods"][0].update(options=[1]),
    "a row before the first": lambda d: d["rows"].update({"transformer.wte.weight": [-1]}),
    "rows of another": lambda d: d["rows"].update({"transformer.wpe.weight": [0]}),
    "a file elsewhere": lambda d: d.update(tensors="../" + d["tensors"]),
    "a file that is a number": lambda d: d.update(tensors=3),
    "a list": lambda d: d.update(base=[]),
    "a fingerprint of text": lambda d: d["base"].update(fingerprint={"x": "y"}),
    "a fingerprint beyond its range": lambda d: d["base"].update(fingerprint={"x": 1e308}),
    "two splices of one name": lambda d: d["splices"].append(d["splices"][0]),
    "a site twice": lambda d: d["splices"][0]["sites"].append(d["splices"][0]["sites"][0]),
    "a site of another version": lambda d: d["splices"][0]["sites"][0].update(more=1),
    "rows of none": lambda d: d["rows"].update({"transformer.wte.weight": []}),
    "100,000 ports": lambda d: options_of(d).update(ports=["query"] * 100_000),
    "an option that is deep": lambda d: options_of(d).update(ranks=[[[[[[]]]]]]),
    "an option that is not finite": lambda d: options_of(d).update(alpha=float("inf")),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.few(20)
def test_a_damaged_description_changes_nothing(tmp_path: Path, damage: str) -> None:
    model = built_with("gpt2", surgery.method("lora", rank=2))
    surgery.freeze_base(model, keep=["transformer.ln_f"])
    surgery.train_rows(model, "transformer.wte.weight", [2])
    surgery.save(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "surgery.json"
    description = json.loads(path.read_text())
    for file in (tmp_path / "adapter").glob("*.safetensors"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    DAMAGE[damage](description)
    path.write_text(json.dumps(description))
    base = build("gpt2")
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(surgery.StoreError, match="damaged"):
        surgery.load(base, tmp_path / "adapter")
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(base.state_dict()[name], x) for name, x in before.items())


def test_a_description_that_is_deep_is_damaged(saved: Path) -> None:
    (saved / "surgery.json").write_text("[" * 100_000)
    with pytest.raises(surgery.StoreError, match=r"surgery.json is damaged \(RecursionError"):
        surgery.load(build("roberta"), saved)


def test_an_adapter_that_replaces_the_head_of_another_says_so(tmp_path: Path) -> None:
    base = build("roberta")
    for seed, name in enumerate("ab"):
        model = copy.deepcopy(base)
        surgery.splice(model, surgery.method("lora", rank=2), name=name)
        surgery.freeze_base(model, keep=["classifier"])
        with torch.no_grad():
            model.classifier.out_proj.weight.add_(seed + 1.0)
        surgery.save(model, tmp_path / name)
    model = copy.deepcopy(base)
    surgery.load(model, tmp_path / "a")
    surgery.remove(model, "a")
    surgery.load(model, tmp_path / "a")
    with pytest.warns(UserWarning, match=r"its own classifier.out_proj.weight and replaces .* a\."):
        surgery.load(model, tmp_path / "b")


def test_a_second_adapter_is_loaded_beside_the_first(tmp_path: Path) -> None:
    x = inputs("gpt2")
    folders = []
    for name, rank in (("one", 2), ("two", 3)):
        model = build("gpt2")
        surgery.splice(model, surgery.method("lora", rank=rank), name=name)
        surgery.freeze_base(model, keep=[f"transformer.h.{rank - 2}.ln_1"])
        perturb(model)
        folders.append(surgery.save(model, tmp_path / name))
    both, expected = build("gpt2"), build("gpt2")
    for folder, (name, rank) in zip(folders, (("one", 2), ("two", 3)), strict=True):
        surgery.load(both, folder)
        alone = surgery.load(build("gpt2"), folder)
        surgery.splice(expected, surgery.method("lora", rank=rank), name=name)
        with torch.no_grad():
            for key, parameter in surgery.spliced_parameters(alone, name):
                expected.get_parameter(key).copy_(parameter)
            for key in kept_tensors(alone):
                expected.get_parameter(key).copy_(alone.get_parameter(key))
    assert torch.equal(logits(both, x), logits(expected, x))
    assert [report.name for report in surgery.summary(both).reports] == ["one", "two"]
    again = surgery.load(build("gpt2"), surgery.save(both, tmp_path / "both"))
    assert torch.equal(logits(again, x), logits(both, x))
    names = {name.removesuffix(".weight") for name in kept_tensors(both)}
    assert {"transformer.h.0.ln_1", "transformer.h.1.ln_1"} <= names


def test_a_method_that_no_plugin_offers_is_saved_with_a_warning(tmp_path: Path) -> None:
    model = build("gpt2")
    surgery.splice(model, Custom(insert(Shift()), "none"), at=surgery.locate(model).ffn[:1])
    with pytest.warns(UserWarning, match="no installed plugin offers 'custom'"):
        folder = surgery.save(model, tmp_path / "a")
    with pytest.raises(surgery.StoreError, match="a cannot be loaded here: no method 'custom'"):
        surgery.load(build("gpt2"), folder)
    assert json.loads((folder / "surgery.json").read_text())["splices"]


def test_two_adapters_saved_under_one_name_live_in_one_base(tmp_path: Path) -> None:
    ids = torch.arange(14).reshape(2, 7) + 3
    folders, alone = [tmp_path / "one", tmp_path / "two"], []
    for seed, folder in enumerate(folders):
        model = build("gpt2")
        surgery.splice(model, [surgery.method("lora", rank=2), surgery.method("bitfit")])
        torch.manual_seed(seed)
        with torch.no_grad():
            for _, parameter in surgery.spliced_parameters(model):
                parameter.normal_()
            alone.append(model(input_ids=ids).logits)
        surgery.save(model, folder)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # another initialisation is another base
        both = build("gpt2")
        both.load_state_dict(surgery.remove(model).state_dict())
        surgery.load(both, folders[0])
        surgery.load(both, folders[1], name="second")
        with surgery.disabled(both, "default"):
            assert torch.equal(both(input_ids=ids).logits, alone[1])
        surgery.save(both, tmp_path / "both")
        with pytest.raises(surgery.StoreError, match="consists of the splices default, second"):
            surgery.load(build("gpt2"), tmp_path / "both", name="third")


@pytest.mark.parametrize(
    ("choice", "then"),
    [
        (None, {"a": 1.0, "b": 1.0}),
        ("a", {"a": 1.0, "b": 0.0}),
        ({"a": 0.5, "b": 1.0}, {"a": 0.5, "b": 1.0}),
        ({"b": 0.3}, {"a": 0.0, "b": 0.3}),
        ([], {"a": 1.0, "b": 1.0}),  # an adapter that does nothing is not what load is called for
    ],
)
def test_what_was_off_beside_others_is_loaded_off(
    choice: Any, then: dict[str, float], tmp_path: Path
) -> None:
    model = build("gpt2")
    for name in ("a", "b"):
        surgery.splice(model, surgery.method("lora", rank=2), name=name)
    perturb(model)
    surgery.use(model, choice)
    surgery.save(model, tmp_path)
    again = surgery.load(build("gpt2"), tmp_path)
    surgery.use(model, then)
    assert torch.equal(logits(again, inputs("gpt2")), logits(model, inputs("gpt2")))
    surgery.save(model, tmp_path / "b", only="b")
    alone = surgery.load(build("gpt2"), tmp_path / "b", name="c")
    surgery.use(model, {"b": then["b"] or 1.0})
    assert torch.equal(logits(alone, inputs("gpt2")), logits(model, inputs("gpt2")))
