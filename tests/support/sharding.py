"""A small Llama, sharded by FSDP2 and trained for some steps, or divided by a plan."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import surgery
from tests.support.models import build

IDS = torch.arange(28).reshape(4, 7) % 25 + 3
EVERYWHERE = ("query", "key", "value", "output", "up", "gate")


def lora(**options: Any) -> surgery.Method:
    """LoRA of rank 2 at every projection."""
    return surgery.method("lora", **{"rank": 2, "ports": EVERYWHERE} | options)


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


def divided(model: Any, mesh: DeviceMesh) -> Any:
    """Divide a model by transformers' own plan for it, as ``from_pretrained`` does."""
    from transformers.integrations.tensor_parallel import apply_tensor_parallelism

    plan: dict[str, str] = {}
    for name, module in model.named_modules():
        style = model.tp_plan.get(re.sub(r"\.\d+\.", ".*.", name))
        if style:
            plan |= {f"{name}.{own}": style for own, _ in module.named_parameters(recurse=False)}
            plan[name] = style
    takes_plan = len(inspect.signature(apply_tensor_parallelism).parameters) > 2
    return apply_tensor_parallelism(model, mesh, *([plan] if takes_plan else []))


def documented(title: str) -> str:
    """The example of a section below "Sharded" in docs/trainers.md."""
    text = (Path(__file__).parents[2] / "docs/trainers.md").read_text()
    section = next(s for s in text.split("\n### ") if s.startswith(title))
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return str(code)


def distributed(model: Any) -> Any:
    """Divide a model over two processes by what ``from_pretrained(tp_plan="auto")`` calls."""
    names = {"model": model}
    exec(documented("Tensor-parallel plans"), names)
    return names["model"]


def first_alone_writes(rank: int) -> None:
    """Let a save of the library fail in every process but the first if it would write a file."""
    from surgery.adapter import peft_saving, saving

    def write(*_: Any) -> None:
        raise AssertionError("a process that is not the first writes")

    if rank:
        for module, name in ((saving, "write"), (peft_saving, "_write")):
            assert hasattr(module, name)
            setattr(module, name, write)


def _process(rank: int, folder: str, work: Callable[[int, str], None]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    work(rank, folder)
    dist.destroy_process_group()


def in_two_processes(folder: Path, work: Callable[[int, str], None]) -> None:
    """Run ``work(rank, folder)`` in two processes; a fresh model lies in ``folder/base``."""
    fresh().save_pretrained(folder / "base")
    torch.multiprocessing.spawn(_process, args=(str(folder), work), nprocs=2)
