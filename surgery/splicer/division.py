"""Divide what a splice has inserted as a tensor-parallel plan has divided its projections.

splice, in a model that is shown whole      interop/tensor_parallel.py
observe     each projection runs divided: its input is whole or a part, and so is its output
divide      parameters become those of the first process, each process keeps its parts
verify      each host computes divided what it computes whole (division_trial.py)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from surgery.errors import SpliceError
from surgery.host import own_forward, state_of
from surgery.interop import any_process, divide_parameters, division_mesh, evaluating, is_of_plan
from surgery.plugin import Divisible, Dropout, Port
from surgery.splicer.division_trial import ELSEWHERE, Todo, refresh_hosts, verify_division
from surgery.splicer.outputs import floats, outputs
from surgery.splicer.record import Inserted, Report


def divide(model: nn.Module, report: Report, todo: Todo) -> None:
    """Divide what a splice has inserted, in a model that a tensor-parallel plan has divided.

    In other models nothing happens. Every process must call this.

    Raises:
        SpliceError: what is inserted cannot be divided, or would compute something else.
    """
    mesh = division_mesh(model)
    if mesh is None:
        return
    for i in report.inserted:
        require_divisible(model, i)
    with evaluating(model):
        _divide(model, report, todo, mesh)


def _divide(model: nn.Module, report: Report, todo: Todo, mesh: Any) -> None:
    """Do what :func:`divide` says, in evaluation mode."""
    sides = sides_of(model, report, todo, mesh)
    made: dict[int, Any] = {}
    for i in report.inserted:
        module: Any = model.get_submodule(i.path)
        side = sides[projection_of(i)]
        divide_parameters(module, module.divided_axes(side) if side else {}, mesh, made)
    refresh_hosts(model, todo)
    verify_division(model, report, todo, mesh)
    refresh_hosts(model, todo)


def require_divisible(model: nn.Module, i: Inserted) -> None:
    """Raise unless a module updates a projection, and can be divided with it."""
    module, port = model.get_submodule(i.path), i.site.ports[i.edit.port]
    host = model.get_submodule(i.site.path)
    state = state_of(host)
    reason = ""
    if not isinstance(module, Divisible):
        reason = "what it inserts has no divided_axes(side)"
    elif i.edit.verb != "add" or i.edit.reads != (f"{port.name}.source",) or not port.module:
        reason = "it does not add to the output of a projection"
    elif any(isinstance(m, Dropout) and m.p for m in module.modules()):
        reason = "dropout draws masks for whole features"
    elif "forward" in vars(host) or (
        state is not None and any(map(is_of_plan, (*state.around, state.own)))
    ):
        reason = "a forward is set on this module itself"
    if reason:
        raise SpliceError(
            f"method {i.method.name!r} at port {port.name!r} of {i.site.path or 'the model'} does "
            f"not work where tensor parallelism has split the weights: {reason}. {ELSEWHERE}"
        )


def projection_of(i: Inserted) -> str:
    """Return the path of the module that computes the port at which a module was inserted."""
    return i.site.ports[i.edit.port].module


def sides_of(model: nn.Module, report: Report, todo: Todo, mesh: Any) -> dict[str, str]:
    """Return for each projection which side a process has a part of: input, output, or "".

    Raises:
        SpliceError: both are parts, or a part of a fused projection, whose columns are not known.
    """
    seen: dict[str, tuple[int, int]] = {}
    for path, pairs in todo.items():
        host, plan = model.get_submodule(path), pairs[0][1].host
        assert plan is not None
        names = [projection_of(i) for i in report.inserted if i.site.path == path]
        with _observed(model, names, seen):
            outputs(host, own_forward(host), plan.args, plan.kwargs)
    ports = {projection_of(i): i.site.ports[i.edit.port] for i in report.inserted}
    parts: list[bool] = []
    for name, port in ports.items():
        given, returned = seen[name]
        parts += [given != port.in_width, returned != _whole_width(model, port)]
    parts = any_process(parts, mesh)
    found: dict[str, str] = {}
    for (name, port), of_input, of_output in zip(
        ports.items(), parts[::2], parts[1::2], strict=True
    ):
        fused = of_output and port.columns is not None
        if fused or (of_input and of_output):
            which = "both input and output of" if of_input else "the fused output of"
            raise SpliceError(
                f"tensor parallelism has split {which} {name}, so an update of port {port.name!r} "
                f"has no clean part. Leave it out with ports= or at=. {ELSEWHERE}"
            )
        found[name] = "input" if of_input else "output" if of_output else ""
    return found


def _whole_width(model: nn.Module, port: Port) -> int:
    """Return how many features the projection of a port makes, those of other ports included."""
    if port.columns is None or not port.weight:
        return port.width
    return model.get_parameter(port.weight).shape[0 if port.transposed else -1]


@contextmanager
def _observed(
    model: nn.Module, names: list[str], seen: dict[str, tuple[int, int]]
) -> Iterator[None]:
    """Note the widths of input and output of these modules while they run."""

    def noting(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run_and_note(*args: Any, **kwargs: Any) -> Any:
            made = forward(*args, **kwargs)
            given = next(floats([args, kwargs]))
            seen[name] = given.shape[-1], next(floats(made)).shape[-1]
            return made

        return run_and_note

    modules = {name: model.get_submodule(name) for name in names}
    before = {name: vars(module).get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            vars(module)["forward"] = noting(name, module.forward)
        yield
    finally:
        for name, module in modules.items():
            vars(module).pop("forward", None)
            if before[name] is not None:
                vars(module)["forward"] = before[name]
