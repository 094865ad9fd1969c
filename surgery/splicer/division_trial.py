"""Compare what a divided splice computes with what it computes in a single process.

    each host     output, gradients at inserted parameters and at inputs, at a random point
    twice         divided, and in a model that is shown whole (interop/tensor_parallel.py)

So nothing need be known of the styles of a plan.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SpliceError
from surgery.host import own_forward, run, state_of
from surgery.interop import (
    any_process,
    detached_copy,
    draw_anew,
    like,
    map_leaves,
    silenced,
    undivided,
    whole,
)
from surgery.plugin import Method, Site
from surgery.splicer.outputs import floats
from surgery.splicer.record import Report

Todo = dict[str, list[tuple[Method, Site]]]
ELSEWHERE = (
    "Splice method 'lora' without dropout at attention and FFN sites here. Anything else goes into "
    "a base that was loaded without tp_plan=; merged into it and saved, it runs with tp_plan=."
)


@dataclass(frozen=True)
class _Trial:
    """A host run once: its output and the gradients at parameters, spliced; those at its inputs."""

    own: list[Tensor | None]
    inputs: list[Tensor | None]
    base: list[Tensor | None]


def verify_division(model: nn.Module, report: Report, todo: Todo, mesh: Any) -> None:
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
        with ExitStack() as stack:
            for path in todo:
                stack.enter_context(undivided(model.get_submodule(path)))
            refresh_hosts(model, todo)
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
                f"{ELSEWHERE} Or leave this site out with at=."
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
    assert plan is not None
    assert state is not None
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
    rounded = x.dtype.itemsize == 2 or torch.is_autocast_enabled(x.device.type)
    bound = 0.1 if rounded else 0.02
    return bool((x - y).abs().max() <= bound * y.abs().max().clamp(min=1e-6))


def refresh_hosts(model: nn.Module, todo: Todo) -> None:
    """Drop the graphs of hosts, which were captured in the other way of running."""
    for path in todo:
        state = state_of(model.get_submodule(path))
        assert state is not None
        state.refresh()
