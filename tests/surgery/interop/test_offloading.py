"""Models whose parameters are offloaded or sharded: done right, or refused with what to do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import surgery
from tests.support.models import build

IDS = torch.arange(14).reshape(2, 7) + 3


def spliced() -> Any:
    torch.manual_seed(0)
    model = build("llama").eval()
    surgery.splice(model, surgery.method("lora", rank=2))
    with torch.no_grad():
        for _, parameter in surgery.spliced_parameters(model):
            parameter.normal_()
    return model


def fresh() -> Any:
    torch.manual_seed(0)
    return build("llama").eval()


@pytest.mark.filterwarnings("ignore")
def test_an_offloaded_model_is_saved_and_otherwise_refused(tmp_path: Path) -> None:
    model = spliced()
    expected = model(IDS).logits
    accelerate.cpu_offload(model, execution_device="cpu")
    assert torch.equal(model(IDS).logits, expected)
    surgery.save(model, tmp_path)
    assert torch.equal(surgery.load(fresh(), tmp_path)(IDS).logits, expected)
    with pytest.raises(surgery.SpliceError, match="remove_hook_from_submodules"):
        surgery.merge(model)
    other = accelerate.cpu_offload(fresh(), execution_device="cpu")
    with pytest.raises(surgery.SpliceError, match="remove_hook_from_submodules"):
        surgery.splice(other, surgery.method("lora"))


@pytest.fixture
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_one_process")
def test_a_sharded_model_trains_and_is_saved(tmp_path: Path) -> None:
    model = spliced()
    surgery.freeze_base(model)
    expected = model(IDS).logits.detach()
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    out = model(IDS).logits
    torch.testing.assert_close(out, expected)
    out.square().mean().backward()
    assert all(p.grad is not None for _, p in surgery.spliced_parameters(model))
    surgery.save(model, tmp_path)
    torch.testing.assert_close(surgery.load(fresh(), tmp_path)(IDS).logits, expected)
    with pytest.raises(surgery.SpliceError, match="before the model is sharded"):
        surgery.splice(model, surgery.method("lora"), name="second")
    with pytest.raises(surgery.SpliceError, match="before the model is sharded"):
        surgery.merge(model)
