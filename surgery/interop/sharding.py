"""Deal with parameters that FSDP2 or DeepSpeed's ZeRO-3 has sharded over several processes.

    splice before sharding    fully_shard shards what is inserted with its layer
    splice after sharding     the base is gathered while the splice is verified, then sharded again;
                              each inserted module with parameters is sharded by itself

The first way takes fewer collectives in a step. Every process must do the same, in one order.
ZeRO-3 replaces the data of a parameter by an empty tensor between forwards. A model is spliced
before ``deepspeed.initialize``.
Tensor parallelism is another matter (tensor_parallel.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Make the parameters that FSDP2 has sharded whole inside the ``with`` block.

    The memory of the whole model is needed meanwhile.
    """
    sharded = _sharded(model)
    try:
        for module in sharded:
            module.unshard()
        yield
    finally:
        for module in sharded:
            module.reshard()


def _sharded(model: nn.Module) -> list[Any]:
    """Return the modules whose parameters FSDP2 has sharded and not gathered now."""
    if not several_processes():
        return []
    from torch.distributed.fsdp import FSDPModule

    units = [m for m in model.modules() if isinstance(m, FSDPModule)]
    return [m for m in units if any(map(is_distributed, m.parameters()))]


def shard_like(model: nn.Module, inserted: Iterable[nn.Module]) -> None:
    """Shard new modules over the processes over which the model is sharded, if it is.

    Their parameters are first made those of the first process.
    """
    units = _sharded(model)
    if not units:
        return
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = next(p for p in units[0].parameters() if is_distributed(p)).device_mesh
    for module in {id(m): m for each in inserted for m in each.modules()}.values():
        own = list(module.parameters(recurse=False))
        if own and not any(map(is_distributed, own)):
            for parameter in own:
                for axis in range(mesh.ndim):
                    torch.distributed.broadcast(
                        parameter.data, group=mesh.get_group(axis), group_src=0
                    )
            fully_shard(module, mesh=mesh)
    for module in model.modules():  # the next forward of the root finds its parts anew
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            state._is_root = None
            state._state_ctx.all_states.clear()


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process has only a part of a tensor."""
    return is_distributed(tensor) or is_partitioned(tensor)


def is_distributed(tensor: Tensor) -> Any:
    """Whether a tensor is a ``DTensor``, as FSDP2 and tensor parallelism make them."""
    return hasattr(tensor, "full_tensor")


def is_partitioned(tensor: Any) -> bool:
    """Whether ZeRO-3 has taken a parameter apart, and not gathered it now."""
    return getattr(getattr(tensor, "ds_status", None), "name", "") == "NOT_AVAILABLE"


@contextmanager
def joined(parameters: Iterable[Any]) -> Iterator[bool]:
    """Make parameters that ZeRO-3 has taken apart whole inside the ``with`` block, for reading.

    Every process must enter the block. It yields whether there are such parameters.
    """
    apart = [p for p in parameters if is_partitioned(p)]
    if not apart:
        yield False
        return
    from deepspeed.zero import GatheredParameters

    with GatheredParameters(apart):
        yield True


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that FSDP or tensor parallelism has sharded as a whole one.

    Every process of its group must call this.
    """
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def like(tensor: Tensor, target: Any) -> Tensor:
    """Return a whole tensor sharded as ``target`` is, if that is."""
    if not is_distributed(target):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        tensor.to(target.device, target.dtype), target.device_mesh, target.placements
    )


def is_first_process() -> bool:
    """Whether this process is the one that writes files: there is one, or its rank is 0."""
    return not several_processes() or torch.distributed.get_rank() == 0


def wait_for_others() -> None:
    """Wait until every process has come here, if there are several."""
    if several_processes():
        torch.distributed.barrier()


def several_processes() -> bool:
    """Whether processes were joined, by torchrun or by hand; there may be but one."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
