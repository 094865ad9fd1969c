"""A spliced model in half precision, under autocast and on the meta device."""

from __future__ import annotations

import resource
import sys

import pytest
import torch
import transformers as tr
from torch import Tensor

import surgery
from tests.support.models import TEXT, build, inputs, logits, perturb
from tests.support.splices import THREE_METHODS, with_three_methods


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TEXT)
@pytest.mark.few(5)
def test_half_precision_stays(name: str, dtype: torch.dtype) -> None:
    model = build(name).to(dtype)
    base = logits(model, inputs(name))
    surgery.splice(model, THREE_METHODS, example_inputs=inputs(name))
    inserted = {id(p): p.dtype for _, p in surgery.spliced_parameters(model)}
    assert set(inserted.values()) == {torch.float32}
    assert {p.dtype for p in model.parameters() if id(p) not in inserted} == {dtype}
    said = f"inserted parameters are float32, the base is {str(dtype)[6:]}"
    assert said in repr(surgery.summary(model))
    assert torch.equal(logits(model, inputs(name)), base)
    perturb(model)
    moved = logits(model, inputs(name))
    assert moved.dtype == dtype
    wide = with_three_methods(build(name), name)  # the same numbers in float32
    with torch.no_grad():
        for a, b in zip(wide.parameters(), model.parameters(), strict=True):
            a.copy_(b)
    gap = (moved.float() - logits(wide, inputs(name))).abs().max()
    scale = logits(wide, inputs(name)).abs().max()
    assert gap < scale * 64 * torch.finfo(dtype).eps  # a few dozen roundings on the way
    model.to(dtype)  # the user's choice, after all
    assert {p.dtype for p in model.parameters()} == {dtype}
    gap = (logits(model, inputs(name)).float() - logits(wide, inputs(name))).abs().max()
    assert gap < scale * 64 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.few(3)
def test_autocast(name: str) -> None:
    model = build(name)
    with torch.autocast("cpu", torch.bfloat16):
        base = logits(model, inputs(name))
        surgery.splice(model, THREE_METHODS, example_inputs=inputs(name))
        assert torch.equal(logits(model, inputs(name)), base)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    perturb(model)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = logits(model, inputs(name))
        narrow.float().sum().backward()
    wide = logits(model, inputs(name))
    assert (narrow.float() - wide).abs().max() < wide.abs().max() * 0.1
    assert all(p.grad.isfinite().all() for _, p in surgery.spliced_parameters(model))  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_model_of_seven_billion_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = tr.LlamaForCausalLM(tr.LlamaConfig(num_hidden_layers=32))
    assert sum(p.numel() for p in model.parameters()) > 6.7e9
    before = most_memory()
    surgery.splice(model, THREE_METHODS, example_inputs={"input_ids": _ids("meta")})
    grown = most_memory() - before
    assert len(surgery.locate(model, {"input_ids": _ids("meta")})) == 64
    assert all(p.is_meta for p in model.parameters())
    assert grown < 1e9  # the weights would be 27e9; the time it takes: benchmarks/overhead.py


def most_memory() -> int:
    """The most memory that this process has had so far, in bytes, tensors included."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _ids(device: str) -> Tensor:
    return torch.zeros(2, 7, dtype=torch.long, device=device)
