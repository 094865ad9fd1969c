"""The laws on architectures that differ in kind, built from their configs with no line for each."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from tests.support.models import rename
from tests.zoo.build import build, tensors
from tests.zoo.unclaimed import unclaimed

KINDS = {
    "interleaved fused qkv, rotary": "gpt_neox",
    "fused qkv and fused gate": "phi3",
    "fused qkv in Conv1D": "decision_transformer",
    "fused qkv, windows": "modernbert",
    "SDPA called directly": "falcon",
    "ALiBi by baddbmm": "bloom",
    "ALiBi, softmax of its own": "mpt",
    "multi-query": "gpt_bigcode",
    "no scale, float32 scores": "gpt_neo",
    "relative bias, encoder and decoder": "t5",
    "local attention in blocks": "longt5",
    "cross-attention in one class": "bart",
    "audio, encoder and decoder": "whisper",
    "audio, convolutional front": "wav2vec2",
    "multi_head_attention_forward, gated bias": "wavlm",
    "disentangled": "deberta-v2",
    "a softmax in an autograd function": "sew-d",
    "a softmax in a submodule": "squeezebert",
    "projections that return tuples": "ibert",
    "soft-capped": "gemma2",
    "sinks": "gpt_oss",
    "latent": "deepseek_v3",
    "latent, no rotary part in the cache": "deepseek_v2",
    "latent, indexer": "deepseek_v32",
    "compressed keys, sinks, indexer": "deepseek_v4",
    "two attentions that are subtracted": "diffllama",
    "keys of another layer": "gemma3n_text",
    "chunked, temperature": "llama4_text",
    "experts": "mixtral",
    "experts and a shared one": "qwen2_moe",
    "many experts": "olmoe",
    "gated delta rule and attention, gated output": "qwen3_next",
    "state space and attention": "jamba",
    "state space, one shared attention": "zamba2",
    "recurrence and attention": "recurrent_gemma",
    "linear attention and attention": "minimax",
    "convolutional state, one projection module": "zaya",
    "one layer called many times": "albert",
    "heads on the batch axis": "fsmt",
    "partial rotary, attention beside FFN": "gptj",
    "interleaved in partitions": "codegen",
    "qk-norm": "qwen3",
    "norm behind": "olmo2",
    "parallel block": "cohere2",
    "scaled residuals": "granite",
    "layer norm and bias": "starcoder2",
    "squared relu": "nemotron",
    "relu squared by hand, fused qkv": "persimmon",
    "learned positions": "opt",
    "decoder of its own kind": "biogpt",
    "post-norm encoder": "distilbert",
    "generator and discriminator": "electra",
    "bottlenecks and stacked FFNs": "mobilebert",
    "rotary in an encoder": "roformer",
    "proteins": "esm",
    "attention beside convolution kernels": "convbert",
    "block-sparse": "big_bird",
    "sliding chunks": "longformer",
    "hashed buckets, reversible": "reformer",
    "einsum, sequence first": "xlnet",
    "landmarks": "nystromformer",
    "a few queries only": "informer",
    "streams of n-grams": "prophetnet",
    "pooled queries": "funnel",
    "latent queries": "perceiver",
    "shifted windows": "swin",
    "windows and pooled queries": "hiera",
    "a bias per offset, subsampled": "levit",
    "pre-norm vision": "dinov2",
    "relative bias, vision": "beit",
    "detection": "yolos",
    "deformable": "deformable_detr",
    "masks, torch's own attention": "mask2former",
    "assignment over queries": "groupvit",
    "text and image towers": "clip",
    "a pooling head of torch's own attention": "siglip",
    "crossed towers": "bridgetower",
    "text and image in one": "vilt",
    "image to text": "blip",
    "language model behind a tower": "llava",
    "chunks of packed images": "qwen2_vl",
    "time series": "time_series_transformer",
    "patches of time series": "patchtst",
}
SLOW = "longt5 swin levit mask2former deformable_detr perceiver funnel qwen2_vl llama4_text whisper"
CASES = [
    pytest.param(model_type, marks=pytest.mark.slow if model_type in SLOW.split() else (), id=kind)
    for kind, model_type in KINDS.items()
]
NO_LSE = {"longformer", "nystromformer", "sew-d"}  # refused, with a reason
OTHER_FFN = {"zaya", "zamba2"}  # experts one by one; two inputs
NOT_ATTENTION = {  # other softmaxes over the last of three axes, by what they are
    "deepseek_v4": 4,  # how much of each residual stream flows on
    "zaya": 2,  # routers
    "deformable_detr": 4,  # over sampling points
    "mask2former": 4,  # over sampling points
}


def test_the_zoo_is_large() -> None:
    assert len(set(KINDS.values())) == len(KINDS) >= 60


@pytest.mark.parametrize("model_type", CASES)
@pytest.mark.few(20)
def test_a_splice_of_any_kind_starts_exact_is_alive_and_comes_out_again(model_type: str) -> None:
    tiny = build(model_type)
    model, given = tiny.model, tiny.inputs
    expected = outputs(model, given)
    sites = surgery.locate(model, given)
    assert len(sites.attention) >= 1
    assert len(sites.ffn) >= 1 or model_type in OTHER_FFN
    wanted = ("query", "key", "value", "output")
    ports = tuple(p for p in wanted if all(projected(site, p) for site in sites.attention))
    lora, inducer = surgery.method("lora", ports=ports or "value"), surgery.method("inducer")
    methods = [lora] if model_type in NO_LSE else [lora, inducer]
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


@pytest.mark.parametrize("model_type", CASES)
@pytest.mark.few(10)
def test_every_softmax_over_keys_is_a_site_whatever_its_modules_are_called(model_type: str) -> None:
    tiny = build(model_type)
    before = surgery.locate(tiny.model, tiny.inputs)
    others = unclaimed(tiny.model, tiny.inputs, before)
    assert len(others) == NOT_ATTENTION.get(model_type, 0), others
    renamed = rename(tiny.model)
    after = surgery.locate(tiny.model, tiny.inputs)
    assert [s.ports.keys() for s in after] == [s.ports.keys() for s in before]
    assert [s.path for s in after] == [renamed[s.path] for s in before]


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


@pytest.mark.slow
def test_the_zoo_checks_single_types_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "zoo.jsonl"
    command = [sys.executable, "-m", "tests.zoo.check", "gpt2", "--out", str(out)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["type"] for row in rows] == ["gpt2"]
    assert rows[0]["build"] == "ok"
    assert "1 of 1" in done.stdout
