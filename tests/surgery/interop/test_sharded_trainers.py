"""Models that accelerate or DeepSpeed shard: FSDP2 by prepare, ZeRO-3, and what a save is given."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import surgery
from tests.support.models import perturb
from tests.support.sharding import IDS, fresh, sharded, trained

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("format", ["surgery", "peft"])
def test_a_state_dict_of_parts_is_refused_at_once(format: Any, tmp_path: Path) -> None:
    """One process alone would wait for the others for ever."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fresh()
        surgery.splice(model, surgery.method("lora", rank=2))
        surgery.freeze_base(model)
        sharded(model, init_device_mesh("cpu", (1,)))
        for state, fault in ((model.state_dict(), "holds a part of"), ({}, "lacks")):
            with pytest.raises(surgery.SpliceError, match=f"{fault} model.*in every process"):
                surgery.save(model, tmp_path / "parts", format=format, state_dict=state)
        assert not (tmp_path / "parts").exists()
        whole = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
        surgery.save(model, tmp_path / "whole", format=format, state_dict=whole)
        again = surgery.load(fresh(), tmp_path / "whole")
        torch.testing.assert_close(again(IDS).logits, fresh()(IDS).logits)
    finally:
        dist.destroy_process_group()


def test_what_a_plain_save_computes_from_parts_is_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fresh()
        surgery.splice(model, surgery.method("prefix", share="simple"))
        sharded(model, init_device_mesh("cpu", (1,)))
        whole = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
        with pytest.raises(surgery.SpliceError, match="pass plain=False"):
            surgery.save(model, tmp_path / "plain", state_dict=whole)
        surgery.save(model, tmp_path / "all", plain=False, state_dict=whole)
    finally:
        dist.destroy_process_group()


@pytest.fixture
def zero(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that takes parameters apart as ZeRO-3 does: each is empty meanwhile."""
    away: dict[int, torch.Tensor] = {}

    class GatheredParameters:
        def __init__(self, parameters: list[Any]) -> None:
            self.parameters = parameters

        def __enter__(self) -> None:
            for parameter in self.parameters:
                parameter.data = away[id(parameter)]
                parameter.ds_status.name = "AVAILABLE"

        def __exit__(self, *_: object) -> None:
            take_apart(self.parameters)

    def take_apart(parameters: Any) -> None:
        for parameter in parameters:
            away[id(parameter)] = parameter.data
            parameter.data = torch.empty(0)
            parameter.ds_status = SimpleNamespace(name="NOT_AVAILABLE")

    module = SimpleNamespace(GatheredParameters=GatheredParameters)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=module))
    return take_apart


def test_parameters_that_zero_has_taken_apart_are_gathered_for_a_save(
    zero: Any, tmp_path: Path
) -> None:
    """A save of the empty parameters would have lost what was trained, without a word."""
    model = fresh()
    surgery.splice(model, surgery.method("lora", rank=2))
    surgery.freeze_base(model)
    perturb(model)
    expected = model(IDS).logits
    zero(list(model.parameters()))
    surgery.save(model, tmp_path / "adapter")
    again = surgery.load(fresh(), tmp_path / "adapter")
    torch.testing.assert_close(again(IDS).logits, expected)
    assert not any(p.numel() for p in model.parameters())
    with pytest.raises(surgery.SpliceError, match="lacks model"):
        surgery.save(model, tmp_path / "first", state_dict={})
    with pytest.raises(surgery.SpliceError, match="own format, load that into a base"):
        surgery.save(model, tmp_path / "peft", format="peft")
    surgery.splice(model, surgery.method("lora", rank=2), name="late")
    apart = [n for n, p in model.named_parameters() if not p.numel()]
    assert apart
    assert not any("late" in name for name in apart)
    with pytest.raises(surgery.StoreError, match=r"ZeRO-3 has taken .*apart"):
        surgery.hotswap(model, "default", tmp_path / "adapter")


def _accelerate(rank: int, folder: str) -> None:
    """Splice, prepare with FSDP2, train and save in one of two processes."""
    torch.set_num_threads(1)
    places = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # asked for; the group is there
    os.environ.update(places, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.distributed_type = DistributedType.FSDP  # on CPU it takes DDP instead
    accelerator.state.fsdp_plugin = plugin
    assert accelerator.is_fsdp2
    model, plain = fresh(), fresh()
    torch.manual_seed(0)  # the same A in both processes
    surgery.splice(model, surgery.method("lora", rank=2))
    surgery.save(model, f"{folder}/{rank}", plain=False)
    surgery.load(plain, f"{folder}/{rank}")
    surgery.freeze_base(model)
    chosen = [p for p in model.parameters() if p.requires_grad]
    model, optimiser = accelerator.prepare(model, torch.optim.SGD(chosen, lr=0.5))
    assert all(hasattr(p, "full_tensor") for _, p in surgery.spliced_parameters(model))
    for _ in range(3):
        optimiser.zero_grad()
        accelerator.backward(model(IDS[2 * rank : 2 * rank + 2]).logits.square().mean())
        optimiser.step()
    expected = trained(plain, IDS)(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected)
    if rank == 0:  # accelerate's own gathering leaves parts here: no other process answers
        with pytest.raises(surgery.SpliceError, match="holds a part of"):
            surgery.save(model, f"{folder}/first", state_dict=model.state_dict())
    surgery.save(model, f"{folder}/trained")
    torch.testing.assert_close(surgery.load(fresh(), f"{folder}/trained")(IDS).logits, expected)
    dist.destroy_process_group()


@pytest.mark.slow
def test_fsdp2_through_accelerate_learns_what_one_process_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_accelerate, args=(str(tmp_path),), nprocs=2)
