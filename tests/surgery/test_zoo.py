"""The laws on architectures that differ in kind, built from their configs with no line for each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import surgery
from tests.zoo import build, tensors

KINDS = {
    "interleaved fused qkv, rotary": "gpt_neox",
    "fused qkv and fused gate": "phi3",
    "SDPA called directly": "falcon",
    "ALiBi by baddbmm": "bloom",
    "ALiBi, softmax of its own": "mpt",
    "multi-query": "gpt_bigcode",
    "relative bias, encoder and decoder": "t5",
    "cross-attention in one class": "bart",
    "audio": "whisper",
    "disentangled": "deberta-v2",
    "shifted windows": "swin",
    "soft-capped": "gemma2",
    "sinks": "gpt_oss",
    "latent": "deepseek_v3",
    "experts": "mixtral",
    "hybrid, gated output": "qwen3_next",
    "one layer called many times": "albert",
    "heads on the batch axis": "fsmt",
    "partial rotary, attention beside FFN": "gptj",
    "interleaved in partitions": "codegen",
    "qk-norm": "qwen3",
    "text and image towers": "clip",
    "pre-norm vision": "dinov2",
    "convolutional front": "wav2vec2",
    "post-norm encoder": "distilbert",
    "chunks of packed images": "qwen2_vl",
}


@pytest.mark.parametrize("model_type", KINDS.values(), ids=KINDS.keys())
def test_a_splice_of_any_kind_starts_exact_is_alive_and_comes_out_again(model_type: str) -> None:
    tiny = build(model_type)
    model, given = tiny.model, tiny.inputs
    expected = outputs(model, given)
    sites = surgery.locate(model, given)
    assert len(sites.attention) >= 1
    assert len(sites.ffn) >= 1
    wanted = ("query", "key", "value", "output")
    ports = tuple(p for p in wanted if all(projected(site, p) for site in sites.attention))
    methods = [surgery.method("inducer", key_rank=2, value_rank=2)]
    methods += [surgery.method("lora", rank=2, ports=ports)] if ports else []
    report = surgery.splice(model, methods, at=sites.attention)
    assert len(report.sites) == len(sites.attention)
    same(outputs(model, given), expected)
    with torch.no_grad():
        for _, parameter in surgery.spliced_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.3)
    moved = outputs(model, given)
    assert not all(map(torch.equal, moved, expected))
    surgery.remove(model)
    same(outputs(model, given), expected)


def projected(site: surgery.Site, port: str) -> bool:
    """Does a projection make this port here? (Not where weights meet inputs in an einsum.)"""
    return port in site.ports and site.ports[port].in_width is not None


def outputs(model: Any, given: dict[str, Any]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return [t.clone() for t in tensors(model(**copy.deepcopy(given)))]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert len(a) == len(b)
    assert all(map(torch.equal, a, b))
