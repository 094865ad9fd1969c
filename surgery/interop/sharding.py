"""Deal with parameters that FSDP2 has sharded over several processes.

    splice before sharding    fully_shard shards what is inserted with its layer
    splice after sharding     the base is gathered while the splice is verified, then sharded again;
                              each inserted module with parameters is sharded by itself

The first way takes fewer collectives in a step. Every process must do the same, in one order.
ZeRO-3 and tensor parallelism are other matters (zero_partitions.py, tensor_parallel.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from surgery.interop.zero_partitions import is_gathered_by_user, is_of_zero, joined


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Make the parameters that FSDP2 or ZeRO-3 has sharded whole inside the ``with`` block.

    The memory of the whole model is needed meanwhile.
    """
    sharded = _sharded(model)
    try:
        for module in sharded:
            module.unshard()
        with joined(model.parameters()):
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

    Their parameters are first made those of the first process. ``deepspeed.initialize`` takes them
    apart later.
    """
    units, made = _sharded(model), list(inserted)
    if several_processes() and any(map(is_of_zero, model.parameters())):
        for parameter in (p for module in made for p in module.parameters()):
            torch.distributed.broadcast(parameter.data, src=0)
    if not units:
        return
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = next(p for p in units[0].parameters() if is_distributed(p)).device_mesh
    for module in {id(m): m for each in made for m in each.modules()}.values():
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
    return is_distributed(tensor) or is_of_zero(tensor)


def is_in_parts(tensor: Any) -> bool:
    """Whether a tensor is sharded, and no process alone can read all of it now."""
    return is_distributed(tensor) or (is_of_zero(tensor) and not is_gathered_by_user(tensor))


def is_distributed(tensor: Tensor) -> Any:
    """Whether a tensor is a ``DTensor``, as FSDP2 and tensor parallelism make them."""
    return hasattr(tensor, "full_tensor")


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
