"""Divide a splice that is older than the tensor-parallel plan, at the first call of each host.

    first host      everything that was spliced in can be divided, or nothing is; the first
                    process's values count
    each host       observe, as a later splice does (division.py); parameters stay whole and are
                    read in part (interop/carried_over.py); verify, with the arguments of the call

If a host fails, what was divided before it is read whole again, and the call raises.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from surgery.errors import ForwardError, SpliceError
from surgery.host import divided_in, state_of
from surgery.interop import (
    carry_over,
    division_mesh,
    evaluating,
    give_back,
    is_carried_over,
    is_sharded,
    outside_inference_mode,
    why_never_whole,
)
from surgery.splicer.division import projection_of, require_divisible, sides_of
from surgery.splicer.division_trial import Todo, refresh_hosts, verify_division
from surgery.splicer.record import Inserted, Report, reports


class LateDivision:
    """Divides what was spliced into a model, one host a call. A host keeps it for its model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __call__(self, path: str, divided: str, args: Any, kwargs: Any) -> None:
        """Divide a host that is about to run with these arguments. Every process must call this.

        Raises:
            ForwardError: it cannot be divided, or would compute something else.
        """
        model = self._model()
        try:
            if model is None:
                raise SpliceError("the model that it was spliced into is gone.")
            _divide(model, path, args, kwargs)
        except SpliceError as error:
            if model is not None:
                _give_back(model)
            raise ForwardError(
                f"{path or 'the model'}: a tensor-parallel plan has divided {divided} after the "
                f"splice, and what is spliced in is whole. {error} Nothing is divided now; "
                "surgery.save(model, folder) in every process saves what is spliced in."
            ) from error


def _inserted(model: nn.Module) -> list[tuple[Inserted, nn.Module]]:
    every = [i for report in reports(model).values() for i in report.inserted]
    return [(i, model.get_submodule(i.path)) for i in every]


@outside_inference_mode
def _divide(model: nn.Module, path: str, args: Any, kwargs: Any) -> None:
    """Check the whole model, then divide what is inserted in one host and not divided yet."""
    whole = [(i, m) for i, m in _inserted(model) if not _is_done(m)]
    for i, module in whole:
        within = model.get_submodule(i.site.path)
        state = state_of(within)
        if state is not None and divided_in(within, state) is not None:
            require_divisible(model, i)
        if any(type(p) is not nn.Parameter for p in module.parameters()):
            raise SpliceError(f"A parameter of {i.path} is of a class of its own.")
    mesh, why_not = division_mesh(model), why_never_whole(model)
    if why_not or mesh is None:
        raise SpliceError(f"A splice cannot see it whole: {why_not or 'it has no mesh'}.")
    every = [p for _, module in _inserted(model) for p in module.parameters()]
    if not any(map(is_carried_over, every)):  # the first host
        for parameter in every:
            if not is_sharded(parameter):
                torch.distributed.broadcast(parameter.data, group=mesh.get_group(), group_src=0)
    _divide_host(model, path, [i for i, _ in whole if i.site.path == path], mesh, args, kwargs)


def _divide_host(
    model: nn.Module, path: str, inserted: list[Inserted], mesh: Any, args: Any, kwargs: Any
) -> None:
    """Divide what is inserted in one host, and verify it."""
    todo: Todo = {path: []}
    for i in inserted:
        assert i.site.host is not None
        plan = dataclasses.replace(i.site.host, args=args, kwargs=kwargs)
        todo[path].append((i.method, dataclasses.replace(i.site, host=plan)))
    report = Report("carried over", (), inserted)
    not_checkpointed = saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with evaluating(model.get_submodule(path)), not_checkpointed:
        sides = sides_of(model, report, todo, mesh)
        for i in inserted:
            module: Any = model.get_submodule(i.path)
            side = sides[projection_of(i)]
            axes = module.divided_axes(side) if side else {}
            for name, parameter in module.named_parameters():
                if not is_carried_over(parameter):
                    carry_over(parameter, axes.get(name), mesh)
        refresh_hosts(model, todo)
        verify_division(model, report, todo, mesh)
        refresh_hosts(model, todo)


def _give_back(model: nn.Module) -> None:
    """Let every process compute with whole parameters again."""
    for i, module in _inserted(model):
        for parameter in module.parameters():
            give_back(parameter)
        state = state_of(model.get_submodule(i.site.path))
        assert state is not None
        state.refresh()


def _is_done(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and all(is_sharded(p) or is_carried_over(p) for p in parameters)
