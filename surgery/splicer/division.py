"""Divide what a splice has inserted as a tensor-parallel plan has divided its projections.

    splice, in a model that is shown whole      interop/tensor_parallel.py
    observe     each projection runs divided: its input is whole or a part, and so is its output
    divide      parameters become those of the first process, each process keeps its parts
    verify      output and gradients of each host, divided and whole, at a random point

Verification compares with the forward of a single process, so it needs to know no style of plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SpliceError
from surgery.host import own_forward, run, state_of
from surgery.interop import (
    any_process,
    detached_copy,
    divide_parameters,
    division_mesh,
    draw_anew,
    like,
    map_leaves,
    silenced,
    undivided,
    whole,
)
from surgery.plugin import Divisible, Dropout, Method, Site
from surgery.splicer.outputs import floats, outputs
from surgery.splicer.record import Inserted, Report

Todo = dict[str, list[tuple[Method, Site]]]
_ELSEWHERE = (
    "Splice method 'lora' without dropout at attention and FFN sites here. Anything else goes into "
    "a base that was loaded without tp_plan=; merged into it and saved, it runs with tp_plan=."
)


@dataclass(frozen=True)
class _Trial:
    """A host run once: its output and the gradients at parameters, spliced; those at its inputs."""

    own: list[Tensor | None]
    inputs: list[Tensor | None]
    base: list[Tensor | None]


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
        _require_divisible(model, i)
    sides = _sides(model, report, todo, mesh)
    made: dict[int, Any] = {}
    for i in report.inserted:
        module: Any = model.get_submodule(i.path)
        side = sides[_projection(i)]
        divide_parameters(module, module.divided_axes(side) if side else {}, mesh, made)
    _refresh(model, todo)
    _verify(model, report, todo, mesh)
    _refresh(model, todo)


def _require_divisible(model: nn.Module, i: Inserted) -> None:
    """Raise unless a module updates a projection, and can be divided with it."""
    module, port = model.get_submodule(i.path), i.site.ports[i.edit.port]
    host = model.get_submodule(i.site.path)
    reason = ""
    if not isinstance(module, Divisible):
        reason = "what it inserts has no divided_axes(side)"
    elif i.edit.verb != "add" or i.edit.reads != (f"{port.name}.source",) or not port.module:
        reason = "it does not add to the output of a projection"
    elif any(isinstance(m, Dropout) and m.p for m in module.modules()):
        reason = "dropout draws masks for whole features"
    elif "forward" in vars(host):
        reason = "a forward is set on this module itself"
    if reason:
        raise SpliceError(
            f"method {i.method.name!r} at port {port.name!r} of {i.site.path or 'the model'} does "
            f"not work where tensor parallelism has split the weights: {reason}. {_ELSEWHERE}"
        )


def _projection(i: Inserted) -> str:
    return i.site.ports[i.edit.port].module


def _sides(model: nn.Module, report: Report, todo: Todo, mesh: Any) -> dict[str, str]:
    """Return for each projection which side a process has a part of: input, output, or "".

    Raises:
        SpliceError: both are parts, or a part of a fused projection, whose columns are not known.
    """
    seen: dict[str, tuple[int, int]] = {}
    for path, pairs in todo.items():
        host, plan = model.get_submodule(path), pairs[0][1].host
        assert plan is not None
        names = [_projection(i) for i in report.inserted if i.site.path == path]
        with _observed(model, names, seen):
            outputs(host, own_forward(host), plan.args, plan.kwargs)
    ports = {_projection(i): i.site.ports[i.edit.port] for i in report.inserted}
    names = list(ports)
    parts = [
        part
        for name in names
        for part in (
            seen[name][0] != ports[name].in_width,
            ports[name].columns is None and seen[name][1] != ports[name].width,
        )
    ]
    parts = any_process(parts, mesh)
    found: dict[str, str] = {}
    for name, of_input, of_output in zip(names, parts[::2], parts[1::2], strict=True):
        if of_input and of_output:
            raise SpliceError(
                f"tensor parallelism has split both the input and the output of {name}, so an "
                f"update of it has no place. {_ELSEWHERE}"
            )
        found[name] = "input" if of_input else "output" if of_output else ""
    return found


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


def _refresh(model: nn.Module, todo: Todo) -> None:
    """Drop the graphs of hosts, which were captured in the other way of running."""
    for path in todo:
        state = state_of(model.get_submodule(path))
        assert state is not None
        state.refresh()


def _verify(model: nn.Module, report: Report, todo: Todo, mesh: Any) -> None:
    """Raise unless each host computes divided what it computes whole, and so do its gradients."""
    named = {
        path: [
            f"{i.path}.{name}"
            for i in report.inserted
            if i.site.path == path
            for name, _ in model.get_submodule(i.path).named_parameters()
        ]
        for path in todo
    }
    every = [model.get_parameter(name) for names in named.values() for name in names]
    if not every or every[0].is_meta:
        return
    start = [whole(p.detach()).clone() for p in every]
    try:
        _move(every)
        divided = {path: _trial(model, path, todo, names) for path, names in named.items()}
        with undivided(model):
            _refresh(model, todo)
            alone = {path: _trial(model, path, todo, names) for path, names in named.items()}
    finally:
        with torch.no_grad():
            for parameter, values in zip(every, start, strict=True):
                parameter.copy_(like(values, parameter))
    wrong = {path: _differing(divided[path], alone[path], named[path]) for path in todo}
    for (path, what), differs in zip(
        wrong.items(), any_process([bool(w) for w in wrong.values()], mesh), strict=True
    ):
        if differs:
            raise SpliceError(
                f"{path or 'the model'}: where tensor parallelism has split the weights, "
                f"{what or 'another process'} differs from that of a single process. "
                f"{_ELSEWHERE} Or leave this site out with at=."
            )


def _move(parameters: list[nn.Parameter]) -> None:
    """Move parameters off their start, those of all processes alike."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.add_(like(noise, parameter))


def _trial(model: nn.Module, path: str, todo: Todo, names: list[str]) -> _Trial:
    """Run a host spliced and as it was before, with gradients."""
    host, plan = model.get_submodule(path), todo[path][0][1].host
    state = state_of(host)
    assert plan is not None and state is not None
    on = state.all_on()
    given = plan.args, plan.kwargs
    parameters = [model.get_parameter(name) for name in names]
    wanted = [p.requires_grad for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    with silenced(host), torch.enable_grad():
        spliced = _gradients(lambda *a, **k: run(host, state, a, k, on), given, parameters)
        base = _gradients(own_forward(host), given, [])
    for parameter, before in zip(parameters, wanted, strict=True):
        parameter.requires_grad_(before)
    count = 1 + len(parameters)
    return _Trial(spliced[:count], spliced[count:], base[1:])


def _gradients(
    forward: Callable[..., Any], given: Any, parameters: list[nn.Parameter]
) -> list[Tensor | None]:
    """Return the first output, and the gradients at parameters and at each input."""
    draw_anew()
    args, kwargs = map_leaves(detached_copy(given), _with_gradient)
    output = next(floats(forward(*args, **kwargs)))
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(output.shape, generator=generator).to(output.device)
    inputs = [t for t in floats([args, kwargs]) if t.requires_grad]
    loss = (output.float() * weights).sum()
    found = torch.autograd.grad(loss, [*parameters, *inputs], allow_unused=True)
    return [output.detach(), *(None if g is None else whole(g) for g in found)]


def _with_gradient(x: Any) -> Any:
    """Let a tensor of activations ask for a gradient."""
    floating = isinstance(x, Tensor) and x.is_floating_point()
    return x.requires_grad_() if floating and x.is_leaf else x


def _differing(divided: _Trial, alone: _Trial, names: list[str]) -> str:
    """Return which of these differs, in words; "" if none does.

    What the plan itself lets differ, such as the gradient at a table of positions, does not count.
    """
    told = ["the output", *(f"the gradient of {name}" for name in names)]
    for what, x, y in zip(told, divided.own, alone.own, strict=True):
        if not _alike(x, y):
            return what
    inputs = zip(divided.inputs, alone.inputs, divided.base, alone.base, strict=True)
    wrong = any(not _alike(x, y) and _alike(of_base, there) for x, y, of_base, there in inputs)
    return "the gradient of the input" if wrong else ""


def _alike(x: Tensor | None, y: Tensor | None) -> bool:
    if x is None or y is None or x.shape != y.shape:
        return x is y
    bound = 0.1 if x.dtype.itemsize == 2 else 0.02
    return bool((x - y).abs().max() <= bound * y.abs().max().clamp(min=1e-6))
