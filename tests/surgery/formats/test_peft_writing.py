"""What is written as PEFT's: identities, what other readers need, and what is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import surgery
from tests.support.models import build, inputs, logits, perturb
from tests.support.peft_cases import base, reloaded, scores

LORA = surgery.method("lora", rank=2)
TARGETS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
SIZES = dict(zip(TARGETS, ((32, 96), (32, 32), (32, 128), (128, 32)), strict=True))


def written(model: nn.Module, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    surgery.save(model, path, format="peft")
    config = json.loads((path / "adapter_config.json").read_text())
    return config, load_file(path / "adapter_model.safetensors")


@st.composite
def adapters(draw: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A PEFT LoRA of two layers: any targets in any layers, ranks and scales by any pattern."""
    paths = [f"transformer.h.{layer}.{t}" for layer in (0, 1) for t in TARGETS]
    chosen = draw(st.lists(st.sampled_from(paths), min_size=1, unique=True))
    names = [*TARGETS, "c_proj", r"h\.1\..*", r".*attn.*", r"^transformer.h.0.mlp.c_fc"]
    numbers = st.sampled_from([1, 2, 3, 5])
    patterns = st.dictionaries(st.sampled_from(names), numbers, max_size=2)
    config = {
        "peft_type": "LORA", "r": draw(numbers), "lora_alpha": draw(st.sampled_from([1, 8, 0.5])),
        "rank_pattern": draw(patterns), "alpha_pattern": draw(patterns),
        "use_rslora": draw(st.booleans()), "lora_bias": draw(st.booleans()),
        "target_modules": chosen, "bias": "none",
    }  # fmt: skip
    if not config["lora_bias"]:  # PEFT has one or the other
        config["use_dora"] = draw(st.booleans())
    found = {}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    for path in chosen:
        rank = config["rank_pattern"].get(
            peft.utils.other.get_pattern_key(config["rank_pattern"], path), config["r"]
        )
        d_in, d_out = SIZES[path.partition(".h.")[2][2:]]
        shapes = {"lora_A.weight": (rank, d_in), "lora_B.weight": (d_out, rank)}
        shapes |= {"lora_B.bias": (d_out,)} if config["lora_bias"] else {}
        shapes |= {"lora_magnitude_vector": (d_out,)} if config.get("use_dora") else {}
        for part, shape in shapes.items():
            key = f"base_model.model.{path}.{part}"
            found[key] = torch.randn(shape, generator=generator)
    return config, found


def scale_of(config: dict[str, Any], path: str) -> tuple[int, float]:
    """The rank and the scale that PEFT gives to a module."""
    key = peft.utils.other.get_pattern_key
    ranks, alphas = config["rank_pattern"], config["alpha_pattern"]
    rank = ranks.get(key(ranks, path), config["r"])
    alpha = alphas.get(key(alphas, path), config["lora_alpha"])
    return rank, alpha / (rank**0.5 if config["use_rslora"] else rank)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(adapters())
def test_from_peft_and_to_peft_is_the_identity(tmp_path: Path, adapter: Any) -> None:
    config, tensors = adapter
    (tmp_path / "in").mkdir(exist_ok=True)
    (tmp_path / "in/adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "in/adapter_model.safetensors")
    model = surgery.load(build("gpt2"), tmp_path / "in")
    out, again = written(model, tmp_path / "out")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())
    for path in config["target_modules"]:
        assert scale_of(out, path) == pytest.approx(scale_of(config, path))
    wanted = {path for path, _ in build("gpt2").named_modules() if any(
        path == t or path.endswith(f".{t}") for t in out["target_modules"])}  # fmt: skip
    assert wanted == set(config["target_modules"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {"ports": ("query", "value")}),  # two of the three parts of one projection
        ("gpt2", {"ports": "all", "fused": True, "bias": True, "rslora": True}),
        ("llama", {"ports": "all", "ranks": {"layers.0": 1, "q_proj": 3}, "alphas": {"v_proj": 5}}),
    ],
)
def test_what_was_trained_here_gives_the_same_outputs_in_peft(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = base(name)
    surgery.splice(model, surgery.method("lora", rank=2, **options))
    perturb(model, 0.3)
    expected = scores(model, name)
    written(model, tmp_path)
    torch.testing.assert_close(scores(reloaded(name, tmp_path), name), expected)
    back = surgery.load(base(name), tmp_path)
    torch.testing.assert_close(scores(back, name), expected)


def test_heads_biases_and_rows_go_along(tmp_path: Path) -> None:
    model = base("roberta")
    surgery.splice(model, surgery.method("lora", rank=2))
    bias = "roberta.encoder.layer.0.attention.self.query.bias"
    surgery.freeze_base(model, keep=["classifier", bias])
    surgery.train_rows(model, "roberta.embeddings.word_embeddings.weight", [7, 9])
    perturb(model)
    with torch.no_grad():
        model.get_parameter(bias).add_(0.5)
        model.classifier.out_proj.weight.add_(0.5)
        model.roberta.embeddings.word_embeddings.weight[[7, 9]] += 0.5
    expected = scores(model, "roberta")
    config, tensors = written(model, tmp_path)
    assert config["modules_to_save"] == ["classifier"]
    assert config["bias"] == "lora_only"
    assert config["task_type"] == "SEQ_CLS"
    assert f"base_model.model.{bias[:-4]}base_layer.bias" in tensors
    torch.testing.assert_close(scores(reloaded("roberta", tmp_path), "roberta"), expected)
    back = surgery.load(base("roberta"), tmp_path)
    torch.testing.assert_close(scores(back, "roberta"), expected)


def test_two_adapters_of_peft_keep_a_head_each(tmp_path: Path) -> None:
    """Their heads switch with them, and go back to PEFT's format as they came."""
    expected, files = {}, {}
    for name, noise in (("a", 0.2), ("b", 0.5)):
        model = base("roberta")
        surgery.splice(model, [LORA, surgery.method("full", modules="classifier")])
        perturb(model, noise)
        expected[name] = scores(model, "roberta")
        config, files[name] = written(model, tmp_path / name)
        assert config["modules_to_save"] == ["classifier"]
        theirs = scores(reloaded("roberta", tmp_path / name), "roberta")
        torch.testing.assert_close(theirs, expected[name])
    model = base("roberta")
    before = scores(model, "roberta")
    for name in "ab":
        surgery.load(model, tmp_path / name, name=name)
    for name in "ab":
        with surgery.using(model, name):
            torch.testing.assert_close(scores(model, "roberta"), expected[name])
        surgery.save(model, tmp_path / f"{name} again", only=name, format="peft")
        again = load_file(tmp_path / f"{name} again" / "adapter_model.safetensors")
        assert again.keys() == files[name].keys()
        assert all(torch.equal(again[key], tensor) for key, tensor in files[name].items())
    surgery.remove(model)
    assert torch.equal(scores(model, "roberta"), before)


def test_a_classifier_whose_head_was_not_trained_loads_in_peft(tmp_path: Path) -> None:
    """PEFT would look for a head in a file with the task SEQ_CLS."""
    model = base("roberta")
    surgery.splice(model, surgery.method("ia3"))
    perturb(model)
    assert written(model, tmp_path)[0]["task_type"] is None
    expected = scores(model, "roberta")
    torch.testing.assert_close(scores(reloaded("roberta", tmp_path), "roberta"), expected)


def test_what_vllm_and_the_converter_to_gguf_ask_for(tmp_path: Path) -> None:
    """Their readers take r and lora_alpha as whole numbers, and strip these ends from the keys."""
    model = base("llama")
    surgery.splice(model, surgery.method("lora", rank=4, alpha=8.0, ports=("query", "value")))
    config, tensors = written(model, tmp_path)
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert type(config["lora_alpha"]) is int
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert (config["bias"], config["modules_to_save"], config["use_dora"]) == ("none", None, False)
    names = dict(model.named_modules())
    for key in tensors:
        path, end = key.removeprefix("base_model.model.").split(".lora_")
        assert path in names
        assert end in ("A.weight", "B.weight")
    known = {f.name for f in peft.LoraConfig.__dataclass_fields__.values()}
    assert config.keys() <= known


REFUSED: list[tuple[list[tuple[str, dict[str, Any]]], str]] = [
    ([("inducer", {"key_rank": 1, "value_rank": 1})], "no place for 'inducer'"),
    ([("ffn_adapter", {"rank": 2})], "no place for 'ffn_adapter'"),
    ([("lora", {"rank": 1}), ("ia3", {})], "holds one method, and this model has 'ia3'"),
    ([("prefix", {"length": 2})], "shift=False"),
    ([("prefix", {"length": 2, "shift": True, "gate": True})], "gate=True"),
]


@pytest.mark.parametrize(("methods", "match"), REFUSED)
def test_what_has_no_place_is_refused_by_name_before_anything_is_written(
    methods: list[tuple[str, dict[str, Any]]], match: str, tmp_path: Path
) -> None:
    model = build("gpt2")
    surgery.splice(model, [surgery.method(name, **options) for name, options in methods])
    with pytest.raises(surgery.SpliceError, match=match):
        surgery.save(model, tmp_path / "new", format="peft")
    assert not (tmp_path / "new").exists()


def test_other_things_without_a_place(tmp_path: Path) -> None:
    model = build("gpt2")
    first = surgery.locate(model).layers(0, 1)
    surgery.splice(model, surgery.method("prefix", length=2), at=first, name="p")
    surgery.splice(model, surgery.method("lora", rank=1), name="l")
    with pytest.raises(surgery.SpliceError, match="'lora' of splice 'l', 'prefix' of splice 'p'"):
        surgery.save(model, tmp_path, format="peft")
    surgery.remove(model, "p")
    surgery.freeze_base(model, keep=["transformer.ln_f.weight"])
    with pytest.raises(surgery.SpliceError, match=r"no place for transformer.ln_f.weight"):
        surgery.save(model, tmp_path, format="peft")
    with pytest.raises(surgery.SpliceError, match="format='onnx' must be one of surgery, peft"):
        surgery.save(model, tmp_path, format="onnx")  # type: ignore[arg-type]
    plain = build("bert")
    surgery.splice(plain, surgery.method("prompt", length=2))
    with pytest.raises(surgery.SpliceError, match="cut=True"):
        surgery.save(plain, tmp_path, format="peft")
    assert list(tmp_path.iterdir()) == []


def test_a_weight_without_a_module_is_refused(tmp_path: Path) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1).eval()
    x = torch.randn(1, 3, 16)
    surgery.splice(model, surgery.method("lora", rank=1), example_inputs=x)
    with pytest.raises(surgery.SpliceError, match="is no module with one"):
        surgery.save(model, tmp_path, format="peft")


def test_a_prefix_that_an_mlp_makes_is_written_plain(tmp_path: Path) -> None:
    model = base("gpt2")
    options = {"length": 3, "shift": True, "share": "global", "hidden": 8, "std": 0.5}
    surgery.splice(model, surgery.method("prefix", **options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config, tensors = written(model, tmp_path)
    assert config["prefix_projection"] is False
    assert tensors["prompt_embeddings"].shape == (3, 2 * 2 * 32)
    expected = logits(model, inputs("gpt2"))
    back = surgery.load(base("gpt2"), tmp_path)
    torch.testing.assert_close(logits(back, inputs("gpt2")), expected)
