"""Models that FSDP2 has sharded, before or after the splice, in one process and in two."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import surgery
from tests.support.models import perturb
from tests.support.sharding import IDS, fresh, sharded, trained
from tests.support.splices import built_with

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


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


@pytest.mark.parametrize("format", ["surgery", "peft"])
def test_a_state_dict_of_parts_is_refused_as_one_process_alone_would_wait(
    format: Any, mesh: DeviceMesh, tmp_path: Path
) -> None:
    model = fresh()
    surgery.splice(model, surgery.method("lora", rank=2))
    perturb(model)
    surgery.freeze_base(model)
    expected = model(IDS).logits
    sharded(model, mesh)
    parts = get_model_state_dict(model)
    for given in (parts, {name: t for name, t in parts.items() if "lora" not in name}):
        with pytest.raises(surgery.SpliceError, match=r"state_dict= .*lora.*every process"):
            surgery.save(model, tmp_path, state_dict=given, format=format)
    assert not list(tmp_path.iterdir())
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    surgery.save(model, tmp_path, state_dict=gathered, format=format)
    torch.testing.assert_close(surgery.load(fresh(), tmp_path)(IDS).logits, expected)


@pytest.mark.parametrize("has_run", [True, False])
@pytest.mark.parametrize("name", ["lora", "prefix", "inducer"])
@pytest.mark.few(3)
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


def test_tensor_parallel_layers_are_refused(mesh: DeviceMesh, tmp_path: Path) -> None:
    """Each process would insert modules for heads of its own, and the first one's were saved."""
    surgery.save(built_with("llama", surgery.method("inducer")), tmp_path)
    model = fresh()
    parallelize_module(model.model.layers[0].self_attn.q_proj, mesh, ColwiseParallel())
    for operate in (
        lambda: surgery.splice(model, surgery.method("inducer")),
        lambda: surgery.load(model, tmp_path),
    ):
        with pytest.raises(surgery.SpliceError, match=r"q_proj.weight over processes.*without tp_"):
            operate()
    assert not surgery.summary(model).reports


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
        _checkpoints(rank, model, expected, Path(folder) / f"{name}_checkpoints")
    dist.destroy_process_group()


def _checkpoints(rank: int, model: Any, expected: Tensor, folder: Path) -> None:
    """Save as trainers do: the first process alone with a gathered state, or all together."""
    whole = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if rank == 0:
        model.save_pretrained(folder / "first", state_dict=whole)
    model.save_pretrained(folder / "all", is_main_process=rank == 0)
    dist.barrier()
    for each in ("first", "all"):
        again = surgery.load(fresh(), folder / each)
        torch.testing.assert_close(again(IDS).logits, expected)
        assert (folder / each / "model.safetensors.index.json").exists()


def _tensor_parallel(rank: int, folder: str) -> None:
    """Merge an adapter into a whole base, and run that with transformers' plan."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    kind = type(fresh())
    split = kind.from_pretrained(f"{folder}/base", tp_plan="auto")
    with pytest.raises(surgery.SpliceError, match="tensor parallelism has split"):
        surgery.splice(split, surgery.method("inducer"))
    merged = kind.from_pretrained(f"{folder}/merged", tp_plan="auto").eval()
    expected = torch.load(f"{folder}/logits.pt")
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_merged_adapter_runs_tensor_parallel(tmp_path: Path) -> None:
    model = fresh()
    model.save_pretrained(tmp_path / "base")
    surgery.lora(model, rank=2)
    perturb(model)
    torch.save(model(IDS).logits.detach(), tmp_path / "logits.pt")
    surgery.merge(model)
    model.save_pretrained(tmp_path / "merged")
    torch.multiprocessing.spawn(_tensor_parallel, args=(str(tmp_path),), nprocs=2)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_process, args=(str(tmp_path),), nprocs=2)
