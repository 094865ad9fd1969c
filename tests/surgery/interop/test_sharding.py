"""Models that FSDP2 has sharded, before or after the splice, in one process and in two."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import surgery
from tests.support.models import build, perturb

IDS = torch.arange(28).reshape(4, 7) % 25 + 3
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def fresh() -> Any:
    torch.manual_seed(0)
    return build("llama").eval()


def sharded(model: Any, mesh: DeviceMesh) -> Any:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def trained(model: Any, ids: Tensor) -> Any:
    surgery.freeze_base(model)
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(chosen, lr=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        model(ids).logits.square().mean().backward()
        optimiser.step()
    return model


def test_a_model_sharded_after_the_splice_trains_and_is_saved(
    mesh: DeviceMesh, tmp_path: Path
) -> None:
    model = fresh()
    surgery.splice(model, surgery.method("lora", rank=2))
    perturb(model)
    plain = copy.deepcopy(model)
    trained(plain, IDS)
    trained(sharded(model, mesh), IDS)
    expected = plain(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected)
    surgery.save(model, tmp_path)
    torch.testing.assert_close(surgery.load(fresh(), tmp_path)(IDS).logits, expected)
    with pytest.raises(surgery.SpliceError, match="before the model is sharded"):
        surgery.merge(model)


@pytest.mark.parametrize("has_run", [True, False])
@pytest.mark.parametrize("name", ["lora", "prefix", "inducer"])
def test_a_model_may_be_spliced_after_it_is_sharded(
    name: str, has_run: bool, mesh: DeviceMesh, tmp_path: Path
) -> None:
    model = sharded(fresh(), mesh)
    base = fresh()(IDS).logits
    if has_run:
        model(IDS)
    surgery.splice(model, surgery.method(name))
    surgery.save(model, tmp_path / "start", plain=False)
    plain = surgery.load(fresh(), tmp_path / "start")
    expected = trained(plain, IDS)(IDS).logits
    torch.testing.assert_close(trained(model, IDS)(IDS).logits, expected)
    assert all(hasattr(p, "full_tensor") for _, p in surgery.spliced_parameters(model))
    surgery.save(model, tmp_path / "end")
    again = sharded(fresh(), mesh)
    torch.testing.assert_close(surgery.load(again, tmp_path / "end")(IDS).logits, expected)
    surgery.remove(again)
    assert torch.equal(again(IDS).logits, base)


@pytest.mark.parametrize("splice_first", [True, False])
def test_a_prompt_cannot_run_in_a_sharded_model_and_says_so(
    splice_first: bool, mesh: DeviceMesh
) -> None:
    model = fresh() if splice_first else sharded(fresh(), mesh)
    surgery.splice(model, surgery.method("prompt", length=3))
    if splice_first:
        sharded(model, mesh)
    with pytest.raises(surgery.ForwardError, match="FSDP2 frees the weights"):
        model(IDS)


def _process(rank: int, folder: str) -> None:
    """Splice, train and save in one of two processes; compare with one process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name in ("lora", "prefix", "inducer"):
        model = sharded(fresh(), mesh)
        torch.manual_seed(rank)  # what each process draws for itself
        surgery.splice(model, surgery.method(name))
        surgery.save(model, f"{folder}/{name}", plain=False)
        plain = surgery.load(fresh(), f"{folder}/{name}")
        trained(model, IDS[2 * rank : 2 * rank + 2])
        expected = trained(plain, IDS)(IDS).logits
        torch.testing.assert_close(model(IDS).logits, expected)
        surgery.save(model, f"{folder}/{name}")
        again = surgery.load(sharded(fresh(), mesh), f"{folder}/{name}")
        torch.testing.assert_close(again(IDS).logits, expected)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_process, args=(str(tmp_path),), nprocs=2)
