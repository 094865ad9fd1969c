"""What stands around a spliced model: accelerate, autocast, half precision, the meta device."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers as tr
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

import surgery
from tests.models import TEXT, build, inputs, logits, perturb

METHODS = [
    surgery.method("inducer", key_rank=2, value_rank=2),
    surgery.method("lora", rank=2, ports=("query", "value", "output")),
    surgery.method("lora", rank=2, ports=("up", "output")),
]


def spliced(model: Any, name: str) -> Any:
    surgery.splice(model, METHODS, example_inputs=inputs(name))
    perturb(model)
    return model


@pytest.mark.parametrize("name", ["gpt2", "llama", "roberta"])
def test_hooks_of_accelerate_before_and_after_a_splice(name: str) -> None:
    def hooked(model: nn.Module) -> nn.Module:
        for module in model.modules():
            if not any(module.children()) or "Attention" in type(module).__name__:
                add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
        return model

    expected = logits(spliced(build(name), name), inputs(name))
    before = spliced(hooked(build(name)), name)
    assert torch.equal(logits(before, inputs(name)), expected)
    after = hooked(spliced(build(name), name))
    assert torch.equal(logits(after, inputs(name)), expected)
    for model in (before, after):
        base = logits(build(name), inputs(name))
        surgery.remove(model)
        assert torch.equal(logits(model, inputs(name)), base)
        remove_hook_from_module(model, recurse=True)
        assert torch.equal(logits(model, inputs(name)), base)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_whose_weights_lie_on_disk(name: str, tmp_path: Path) -> None:
    """``device_map`` with offloading: weights come in only while a module runs."""
    expected = logits(spliced(build(name), name), inputs(name))
    model = build(name)
    accelerate.cpu_offload(model, execution_device="cpu")
    spliced(model, name)
    assert torch.equal(logits(model, inputs(name)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TEXT)
def test_half_precision_stays(name: str, dtype: torch.dtype) -> None:
    model = build(name).to(dtype)
    base = logits(model, inputs(name))
    surgery.splice(model, METHODS, example_inputs=inputs(name))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(logits(model, inputs(name)), base)
    perturb(model)
    moved = logits(model, inputs(name))
    assert moved.dtype == dtype
    wide = spliced(build(name), name)  # the same numbers in float32
    with torch.no_grad():
        for a, b in zip(wide.parameters(), model.parameters(), strict=True):
            a.copy_(b)
    gap = (moved.float() - logits(wide, inputs(name))).abs().max()
    scale = logits(wide, inputs(name)).abs().max()
    assert gap < scale * 64 * torch.finfo(dtype).eps  # a few dozen roundings on the way


@pytest.mark.parametrize("name", TEXT)
def test_autocast(name: str) -> None:
    model = build(name)
    with torch.autocast("cpu", torch.bfloat16):
        base = logits(model, inputs(name))
        surgery.splice(model, METHODS, example_inputs=inputs(name))
        assert torch.equal(logits(model, inputs(name)), base)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    perturb(model)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = logits(model, inputs(name))
        narrow.float().sum().backward()
    wide = logits(model, inputs(name))
    assert (narrow.float() - wide).abs().max() < wide.abs().max() * 0.1
    assert all(p.grad.isfinite().all() for _, p in surgery.spliced_parameters(model))  # type: ignore[union-attr]


def test_a_model_of_seven_billion_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = tr.LlamaForCausalLM(tr.LlamaConfig(num_hidden_layers=32))
    assert sum(p.numel() for p in model.parameters()) > 6.7e9
    tracemalloc.start()
    surgery.splice(model, METHODS, example_inputs={"input_ids": _ids("meta")})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(surgery.locate(model, {"input_ids": _ids("meta")})) == 64
    assert all(p.is_meta for p in model.parameters())
    assert peak < 1e9  # the time it takes: benchmarks/overhead.py


def _ids(device: str) -> Tensor:
    return torch.zeros(2, 7, dtype=torch.long, device=device)


def test_data_parallel_replicas_share_a_spliced_model() -> None:
    model = spliced(build("gpt2"), "gpt2")
    with torch.no_grad():
        parallel = nn.parallel.DataParallel(model)
        assert torch.equal(parallel(**inputs("gpt2"))[0], logits(model, inputs("gpt2")))
