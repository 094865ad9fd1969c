"""Compute outputs of a host without a trace, check those of inserted modules, and compare two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SpliceError
from surgery.host import (
    own_forward,
    run,
    run_graph,
    state_of,
)
from surgery.interop import described, detached_copy, draw_anew, silenced
from surgery.plugin import Edit


def outputs(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run ``forward`` on copies of these arguments, without a trace, and return its output."""
    with silenced(module), torch.no_grad():
        draw_anew()  # a forward that draws random numbers draws the same each time
        given = detached_copy((args, kwargs))
        return forward(*given[0], **given[1])


def present_outputs(module: nn.Module, args: Any, kwargs: Any, around: bool = True) -> Any:
    """Return the module's output as it is now, earlier splices included.

    ``around`` decides whether modules that wrap the call of the host run too.
    """
    state = state_of(module)
    if state is None:
        return outputs(module, own_forward(module), args, kwargs)
    on = state.all_on()
    if not (on.names if around else on.edited):
        return outputs(module, own_forward(module), args, kwargs)
    now = run if around else run_graph
    return outputs(module, lambda *a, **k: now(module, state, a, k, on), args, kwargs)


@dataclass(frozen=True)
class Result:
    """The shape and dtype that an inserted module must return: those of its port in the graph."""

    child: str
    edit: Edit
    port: list[tuple[torch.Size, torch.dtype]]

    def check(self, path: str, given: tuple[Any, ...], made: Any) -> None:
        """Raise unless ``made`` can take the place of the port's value."""
        fits = isinstance(made, Tensor)
        wanted = self.port
        if self.edit.verb in ("insert", "feed"):
            wanted = [(given[0].shape, given[0].dtype)]
        if fits and (
            self.edit.verb == "add" or self.edit.batched
        ):  # the graph casts and reshapes it
            fits = made.numel() in [shape.numel() for shape, _ in wanted]
        elif fits:
            fits = made.shape in [shape for shape, _ in wanted]
            fits = fits and made.dtype in (
                given[0].dtype if given else None,
                *(d for _, d in wanted),
            )
        if not fits:
            got = described(made)
            shape, dtype = wanted[0]
            raise SpliceError(
                f"{path}: {self.child} returns {got}, where port {self.edit.port!r} has "
                f"{tuple(shape)} {dtype}. Return a tensor of the same shape and dtype."
            )


@contextmanager
def checked(module: nn.Module, path: str, results: list[Result]) -> Iterator[None]:
    """Check the outputs of inserted modules while the host runs."""

    def checking(result: Result, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run_and_check(*given: Any, **named: Any) -> Any:
            made = forward(*given, **named)
            result.check(path, given, made)
            return made

        return run_and_check

    children = [module.get_submodule(result.child) for result in results]
    own = [vars(child).get("forward") for child in children]
    try:
        for child, result in zip(children, results, strict=True):
            vars(child)["forward"] = checking(result, child.forward)
        yield
    finally:
        for child, before in zip(children, own, strict=True):
            vars(child).pop("forward", None)
            if before is not None:
                vars(child)["forward"] = before


def difference(a: Any, b: Any) -> float | None:
    """Return the largest absolute difference of two nested outputs; 0.0 if all bits are equal.

    A value that is not finite and differs counts as infinite. None on the ``meta`` device.
    """
    largest = 0.0
    for x, y in zip(floats(a), floats(b), strict=True):
        if x.is_meta:
            return None
        if x.shape != y.shape:
            return float("inf")
        if not torch.equal(x, y):
            differs = (x != y) & ~(x.isnan() & y.isnan())
            gap = (x.double() - y.double()).abs()[differs]
            worst = gap.nan_to_num(float("inf"), float("inf")).max() if gap.numel() else 0.0
            largest = max(largest, float(worst))
    return largest


def floats(structure: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors of a nested output."""
    if isinstance(structure, Tensor):
        if structure.is_floating_point():
            yield structure
    elif isinstance(structure, (tuple, list)):
        for item in structure:
            yield from floats(item)
    elif isinstance(structure, dict):
        for item in structure.values():
            yield from floats(item)
    elif hasattr(structure, "__dict__"):  # a dataclass or its like; a cache holds its deeper down
        yield from floats([x for x in vars(structure).values() if isinstance(x, Tensor)])
