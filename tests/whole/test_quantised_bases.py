"""Bases quantised by libraries of the ``cases`` extra: an adapter's whole life on them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from tests.support.models import build, inputs, logits, perturb

pytestmark = [pytest.mark.cases, pytest.mark.filterwarnings("ignore")]
IDS = torch.arange(14).reshape(2, 7) + 3


def trains(model: Any) -> None:
    """Take a step by hand: a gradient reaches every inserted parameter."""
    surgery.freeze_base(model)
    model.train()(input_ids=IDS).logits.square().mean().backward()
    assert all(p.grad is not None for _, p in surgery.spliced_parameters(model))


@pytest.mark.parametrize("name", ["lora", "inducer", "prefix", "ffn_adapter", "ia3"])
def test_a_base_that_torchao_has_quantised(name: str, tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def quantised() -> Any:
        model = build("llama").eval()
        quantize_(model.model.layers, Int8WeightOnlyConfig())
        return model

    model, given = quantised(), inputs("llama")
    base = logits(model, given)
    surgery.splice(model, surgery.method(name))
    if surgery.method(name).start == "exact":
        assert torch.equal(logits(model, given), base)
    trains(model)
    perturb(model)
    surgery.save(model.eval(), tmp_path)
    again = surgery.load(quantised(), tmp_path)
    assert torch.equal(logits(again, given), logits(model, given))
    assert model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] == 10


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_that_bitsandbytes_has_quantised(bits: int, tmp_path: Path) -> None:
    from transformers import (
        AutoModelForCausalLM,
        BitsAndBytesConfig,
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainingArguments,
    )

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=97, num_attention_heads=4, num_key_value_heads=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    options: dict[str, Any] = {4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}.get(
        bits, {"load_in_8bit": True}
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, device_map="cpu",
        quantization_config=BitsAndBytesConfig(**options),
    )  # fmt: skip
    base = model(IDS).logits
    quantizer = type(model.hf_quantizer)
    surgery.splice(model, surgery.method("lora", rank=4))
    assert torch.equal(model(IDS).logits, base)
    trains(model)
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    Trainer(model, arguments, train_dataset=rows).train()
    assert type(copy.deepcopy(model.hf_quantizer)) is quantizer
    surgery.remove(model)
    assert type(model.hf_quantizer) is quantizer


def pretrained(folder: Path, **options: Any) -> Any:
    """A small Llama that was saved and is loaded again, as quantised bases are."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if not folder.exists():
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        config = LlamaConfig(vocab_size=97, num_attention_heads=4, num_key_value_heads=2, **sizes)
        LlamaForCausalLM(config).save_pretrained(folder)
    options = {"dtype": torch.float32, "device_map": "cpu", **options}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.eval()


def by_bitsandbytes(folder: Path, **options: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return pretrained(folder, quantization_config=BitsAndBytesConfig(**options))


def by_torchao(folder: Path, kind: str, **options: Any) -> Any:
    from torchao import quantization

    model = pretrained(folder)
    groups = {name: quantization.PerGroup(size) for name, size in options.items()}
    bits = {"weight_dtype": torch.int4} if groups else {}
    quantization.quantize_(model.model.layers, getattr(quantization, kind)(**groups, **bits))
    return model


def by_quanto(folder: Path, weights: str) -> Any:
    from transformers import QuantoConfig

    return pretrained(folder, quantization_config=QuantoConfig(weights=weights))


def by_hqq(folder: Path, bits: int) -> Any:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model, config = pretrained(folder), BaseQuantizeConfig(nbits=bits, group_size=64)
    for module in list(model.model.layers.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear:
                own = HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu")
                setattr(module, name, own)
    return model


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BASES: dict[str, tuple[Callable[[Path], Any], float]] = {  # and how far the merged layers are
    "bitsandbytes int8": (lambda f: by_bitsandbytes(f, load_in_8bit=True), 0.02),
    "bitsandbytes nf4": (lambda f: by_bitsandbytes(f, **NF4), 1e-6),
    "bitsandbytes nf4, twice, in bfloat16": (
        lambda f: by_bitsandbytes(f, **NF4, bnb_4bit_use_double_quant=True,
                                  bnb_4bit_compute_dtype=torch.bfloat16), 0.01),
    "torchao int8": (lambda f: by_torchao(f, "Int8WeightOnlyConfig"), 1e-5),
    "torchao int8, inputs too": (
        lambda f: by_torchao(f, "Int8DynamicActivationInt8WeightConfig"), 0.02),
    "torchao int4": (
        lambda f: by_torchao(f, "IntxWeightOnlyConfig", granularity=32), 1e-5),
    "torchao int4, inputs in int8": (
        lambda f: by_torchao(f, "Int8DynamicActivationIntxWeightConfig",
                             weight_granularity=32), 0.02),
    "quanto int8": (lambda f: by_quanto(f, "int8"), 1e-5),
    "quanto int4": (lambda f: by_quanto(f, "int4"), 1e-5),
    "hqq 8 bits": (lambda f: by_hqq(f, 8), 1e-5),
    "hqq 4 bits": (lambda f: by_hqq(f, 4), 1e-5),
}  # fmt: skip


@pytest.mark.parametrize("kind", BASES)
def test_the_life_of_an_adapter_on_a_quantised_base(kind: str, tmp_path: Path) -> None:
    make, bound = BASES[kind]
    model = make(tmp_path / "base")
    base = model(IDS).logits
    report = surgery.splice(model, surgery.method("lora", rank=4, ports=("all",)))
    assert len(report.inserted) == 14
    assert torch.equal(model(IDS).logits, base)
    trains(model)
    perturb(model.eval(), 0.1)
    tuned = model(IDS).logits
    surgery.save(model, tmp_path / "adapter")
    again = surgery.load(make(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(again(IDS).logits, tuned)
    assert model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] == 10
    with pytest.raises(surgery.SpliceError, match="dequantize=True"):
        surgery.merge(model)
    merged = surgery.merge(model, dequantize=True)
    assert len(merged.errors) == 14
    assert max(merged.errors.values()) < bound
    gap = (model(IDS).logits - tuned).detach()
    assert float(gap.norm() / tuned.detach().norm()) < bound
    surgery.unmerge(model, merged)
    assert torch.equal(model(IDS).logits, tuned)
    surgery.remove(model)
    assert torch.equal(model(IDS).logits, base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_in_half_precision_runs_on_after_a_merge(
    bits: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Its layers hold whole numbers alone, so the site says in which dtype they compute."""
    from transformers import BitsAndBytesConfig

    double = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    options: Any = {"load_in_4bit": True, **double} if bits == 4 else {"load_in_8bit": True}
    model = pretrained(
        tmp_path / "base", dtype=dtype, quantization_config=BitsAndBytesConfig(**options)
    )
    surgery.splice(model, surgery.method("lora", rank=4, ports=("all",)))
    perturb(model, 0.1)
    tuned = model(IDS).logits.detach().float()
    merged = surgery.merge(model, dequantize=True)
    assert {p.dtype for p in model.parameters()} == {dtype}
    gap = model(IDS).logits.detach().float() - tuned
    assert float(gap.norm() / tuned.norm()) < 0.05
    surgery.unmerge(model, merged)
    assert torch.equal(model(IDS).logits.float(), tuned)


def test_inputs_rounded_to_a_fixed_range_are_no_linear_layer_and_merging_is_refused() -> None:
    from optimum.quanto import Calibration, freeze, qint8, quantize

    model = build("llama").eval()
    quantize(model.model.layers, weights=qint8, activations=qint8)
    with Calibration(), torch.no_grad():
        model(IDS)
    freeze(model)
    surgery.splice(model, surgery.method("lora", ports=("all",)))
    trains(model)
    perturb(model.eval(), 0.1)
    tuned = model(IDS).logits
    with pytest.raises(surgery.SpliceError, match=r"_proj cannot be dequantised.*fixed range"):
        surgery.merge(model, dequantize=True)
    assert torch.equal(model(IDS).logits, tuned)
