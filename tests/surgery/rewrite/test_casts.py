"""Adapters in float32 on a base in half precision: casts are nodes, and only where they must be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import surgery
from tests.support.models import build, inputs, logits, perturb

NAMES = ["lora", "prefix", "inducer", "ia3", "ffn_adapter", "prompt", "ntk_attention"]


def casts(model: Any) -> int:
    graphs = [v.code for group in surgery.variants(model).values() for v in group]
    return sum(code.count("casts_cast(") for code in graphs)


@pytest.mark.parametrize("name", NAMES)
def test_float32_adapters_run_and_train_on_a_half_base(name: str) -> None:
    model = build("llama").bfloat16()
    base = logits(model, inputs("llama"))
    report = surgery.splice(model, surgery.method(name))
    if report.start == "exact":
        assert torch.equal(logits(model, inputs("llama")), base)
    perturb(model)
    out = model(**inputs("llama")).logits
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    for n, p in surgery.spliced_parameters(model):
        assert p.dtype == torch.float32
        assert p.grad is not None, n
        assert p.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        model(**inputs("llama")).logits.float().mean().backward()


def test_there_is_no_cast_where_the_dtypes_agree() -> None:
    model = build("llama")
    surgery.splice(model, surgery.method("inducer"))
    assert casts(model) == 0
    model.bfloat16()  # adapters, too: the graphs of float32 are not used for it
    assert logits(model, inputs("llama")).dtype == torch.bfloat16
    assert casts(model) == 0
    for _, parameter in surgery.spliced_parameters(model):
        parameter.data = parameter.data.float()
    assert logits(model, inputs("llama")).dtype == torch.bfloat16
    assert casts(model) > 0


def test_each_module_follows_its_port(tmp_path: Any) -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(vocab_size=60, decoder_start_token_id=0, **sizes)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    model: Any = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float16
    )
    ffn = model.encoder.block[0].layer[1].DenseReluDense
    assert (ffn.wi.weight.dtype, ffn.wo.weight.dtype) == (torch.float16, torch.float32)
    ids = torch.arange(14).reshape(2, 7)
    given = {"input_ids": ids, "decoder_input_ids": ids[:, :3]}
    surgery.splice(model, surgery.method("lora", ports=("query", "value", "up", "output")))
    assert model(**given).logits.isfinite().all()


class HalfInside(nn.Module):
    """Attention whose heads alone are in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).bfloat16().unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2).to(x.dtype))


@pytest.mark.parametrize("name", ["prefix", "inducer", "ntk_attention", "lora"])
def test_what_a_module_reads_may_have_another_dtype_than_what_it_edits(name: str) -> None:
    torch.manual_seed(0)
    model, x = HalfInside(), torch.randn(2, 5, 12)
    base = model(x)
    surgery.splice(model, surgery.method(name), example_inputs=x)
    perturb(model, 0.5)
    moved = model(x)
    assert moved.dtype == torch.float32
    assert not torch.allclose(moved, base)
    moved.sum().backward()
    assert all(p.grad is not None for _, p in surgery.spliced_parameters(model))
