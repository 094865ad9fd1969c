"""Show a model whole that a tensor-parallel plan of transformers has divided over processes.

    colwise     y_i = x W_i          a process has some output features of W
    rowwise     y = sum_i x_i W_i    a process has some input features of W

transformers holds such a weight as a ``DTensor``, and sets a ``forward`` on its module that takes
and returns the parts. :func:`undivided` puts whole weights and the modules' own forwards in their
place, so what a splice sees is the model of a single process. Every process must enter the block.

A parameter that was spliced in before the plan stays whole, and is read in part (carried_over.py).

In a product ``(x A) B`` beside a divided projection, A or B is divided. Whichever it is, one sum of
the narrow product over the processes is enough (:func:`sum_between`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from surgery.interop.carried_over import CarriedOver, group_of, part_of, read_whole
from surgery.interop.isolation import base_children
from surgery.interop.sharding import is_distributed, several_processes


def own_part(parameter: Any) -> Any:
    """Return the part of a divided parameter that this process computes with; others as they are.

    A gradient of the part is one of the parameter.

    Example:
        ``hidden = torch.nn.functional.linear(x, surgery.own_part(weight))``
    """
    if isinstance(parameter, CarriedOver):
        return part_of(parameter)
    return parameter.to_local() if is_distributed(parameter) else parameter


def sum_between(hidden: Tensor, a: Any, b: Any) -> Tensor:
    """Return ``hidden = x A`` as the product with B must read it, where A or B is divided.

        A divided along its input      hidden is the sum over the processes
        B divided along its output     the gradient of hidden is the sum over the processes
        neither                        hidden as it is

    Args:
        hidden: the product of this process's parts, (..., r).
        a, b: the factors as the module holds them, (r, in) and (r, out).

    Example:
        ``hidden = surgery.sum_between(x @ surgery.own_part(a).T, a, b)``
    """
    function: Any = None
    if (group := _group(a)) is not None:
        function = _Sum
    elif (group := _group(b)) is not None:
        function = _SumOfGradients
    return hidden if function is None else function.apply(hidden, group)


def _group(parameter: Any) -> Any:
    """Return the processes of which each computes with a part of a parameter; None if none do."""
    return parameter.device_mesh.get_group() if _is_split(parameter) else group_of(parameter)


class _Sum(torch.autograd.Function):
    """The sum over the processes; each has the whole gradient of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _SumOfGradients(torch.autograd.Function):
    """The same value; its gradient is the sum of those of the processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None


def divided_parameter(model: nn.Module) -> str:
    """Return the name of a parameter of which each process computes with a part; "" if none is.

    Call this where what FSDP2 has sharded is whole.
    """
    if not several_processes():
        return ""
    return next((name for name, p in model.named_parameters() if _is_split(p)), "")


def division_mesh(model: nn.Module) -> Any:
    """Return the mesh over which a plan of transformers has divided a model; None if none has."""
    if not several_processes():
        return None
    module = next(filter(is_divided_by_plan, model.modules()), None)
    split = filter(_is_split, module.parameters(recurse=False) if module else ())
    return next((parameter.device_mesh for parameter in split), None)  # type: ignore[attr-defined]


def _is_split(tensor: Any) -> bool:
    return is_distributed(tensor) and any(not p.is_replicate() for p in tensor.placements)


def why_never_whole(model: nn.Module) -> str:
    """Return why a divided model cannot be shown whole; "" if it can."""
    meshes = set()
    for path, module in _base_modules(model, ""):
        own: list[tuple[str, Any]] = list(module.named_parameters(recurse=False))
        for name, parameter in own:
            if not is_distributed(parameter):
                continue
            meshes.add(parameter.device_mesh)
            full = f"{path}.{name}" if path else name
            if _is_split(parameter) and _plan_forward(module) is None:
                return f"no plan of transformers has divided {full}, so its forward is unknown"
            if parameter.dim() > 2 and any(p.is_shard(0) for p in parameter.placements):
                return f"each process has experts of its own in {full}"
    if len(meshes) > 1 or any(mesh.ndim > 1 for mesh in meshes):
        return "it is divided along more than one axis of processes"
    return ""


def is_divided_by_plan(module: nn.Module) -> bool:
    """Whether a plan of transformers has divided this module's own parameters."""
    divided = any(map(_is_split, module.parameters(recurse=False)))
    return divided and _plan_forward(module) is not None


def _base_modules(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield a module and those below it with their paths, but for what is spliced in."""
    yield path, module
    for name, child in base_children(module).items():
        yield from _base_modules(child, f"{path}.{name}" if path else name)


def _plan_forward(module: nn.Module) -> Any:
    """Return the forward that a plan of transformers has set on a module; None if there is none."""
    forward = vars(module).get("forward")
    return forward if is_of_plan(forward) else None


def is_of_plan(forward: Any) -> bool:
    """Whether a plan of transformers has made this forward."""
    name = getattr(forward, "__qualname__", "")
    of_plan = name.endswith("install_forward.<locals>.tp_forward")
    return of_plan and forward.__module__.startswith("transformers.")


@contextmanager
def undivided(model: nn.Module) -> Iterator[None]:
    """Make a divided model compute as in a single process inside the ``with`` block.

    What is done to weights of the base in the block is lost. Each process needs the memory of the
    whole model meanwhile.
    """
    weights: list[tuple[dict[str, Any], str, Any]] = []
    forwards: list[tuple[nn.Module, Any]] = []
    wholes: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for module in model.modules():
        forward = _plan_forward(module)
        if forward is not None:
            forwards.append((module, forward))
        for name, parameter in module._parameters.items():
            if parameter is not None and is_distributed(parameter):
                weights.append((module._parameters, name, parameter))
                if id(parameter) not in wholes:
                    whole = parameter.detach().full_tensor()  # type: ignore[attr-defined]
                    wholes[id(parameter)] = nn.Parameter(whole, parameter.requires_grad)
    try:
        for held, name, parameter in weights:
            held[name] = wholes[id(parameter)]
        for module, forward in forwards:
            _set_forward(module, inspect.getclosurevars(forward).nonlocals["original_forward"])
        with read_whole(model.parameters()):
            yield
    finally:
        for held, name, parameter in weights:
            held[name] = parameter
        for module, forward in forwards:
            vars(module)["forward"] = forward


def _set_forward(module: nn.Module, forward: Any) -> None:
    """Let a module run this forward; what is its class's own is not set on the object."""
    if getattr(forward, "__func__", None) is type(module).forward:
        vars(module).pop("forward", None)
    else:
        vars(module)["forward"] = forward


def divide_parameters(module: nn.Module, axes: dict[str, int], mesh: Any, made: Any) -> None:
    """Divide parameters of a module over processes; the first process's values count.

    Args:
        axes: the axis along which each parameter is divided, by name; the others stay whole.
        made: parameters that have been divided already, by the id of the whole one.
    """
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    for path, parameter in list(module.named_parameters()):
        owner, _, name = path.rpartition(".")
        if id(parameter) not in made:
            placement = Shard(axes[path]) if path in axes else Replicate()
            alone = parameter.detach().clone()  # a part of a larger storage cannot be copied later
            part = distribute_tensor(alone, mesh, [placement])
            made[id(parameter)] = parameter, nn.Parameter(part, parameter.requires_grad)
        module.get_submodule(owner)._parameters[name] = made[id(parameter)][1]


def any_process(answers: list[bool], mesh: Any) -> list[bool]:
    """Return for each of these whether it is true in some process of the mesh."""
    told = torch.tensor(answers, dtype=torch.int32, device=mesh.device_type)
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, group=mesh.get_group())
    return [bool(answer) for answer in told]
