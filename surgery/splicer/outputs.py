"""Outputs: what a host and its inserted modules give, and how two outputs differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SpliceError
from surgery.host import (
    original_class,
    run,
    run_graph,
    state_of,
)
from surgery.interop import detached_copy, silenced
from surgery.plugin import Edit


def outputs(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What ``forward`` makes of copies of these arguments, without a trace."""
    with silenced(module), torch.no_grad():
        torch.manual_seed(0)  # a forward that draws draws the same each time
        given = detached_copy((args, kwargs))
        return forward(*given[0], **given[1])


def present_outputs(module: nn.Module, args: Any, kwargs: Any, around: bool = True) -> Any:
    """What the module gives now, by its own forward or with earlier splices.

    ``around`` says whether what is wrapped around its call counts, too.
    """
    state = state_of(module)
    if state is None or not (state.active if around else state.edited):
        return outputs(module, partial(original_class(module).forward, module), args, kwargs)
    now = run if around else run_graph
    return outputs(module, lambda *a, **k: now(module, state, a, k), args, kwargs)


@dataclass(frozen=True)
class Result:
    """What an inserted module must give: the shapes and dtypes that its port has in the graph."""

    child: str
    edit: Edit
    port: list[tuple[torch.Size, torch.dtype]]

    def check(self, path: str, given: tuple[Any, ...], made: Any) -> None:
        """Raise unless ``made`` can take its place."""
        fits = isinstance(made, Tensor)
        wanted = self.port
        if self.edit.verb in ("insert", "feed"):
            wanted = [(given[0].shape, given[0].dtype)]
        if fits and (self.edit.verb == "add" or self.edit.batched):  # put in its dtype and axes
            fits = made.numel() in [shape.numel() for shape, _ in wanted]
        elif fits:
            fits = (made.shape, made.dtype) in wanted
        if not fits:
            got = f"{tuple(made.shape)} {made.dtype}" if isinstance(made, Tensor) else repr(made)
            shape, dtype = wanted[0]
            raise SpliceError(
                f"{path}: {self.child} gives {got}, where port {self.edit.port!r} has "
                f"{tuple(shape)} {dtype}. Return a tensor of the same shape and dtype."
            )


@contextmanager
def checked(module: nn.Module, path: str, results: list[Result]) -> Iterator[None]:
    """Check what inserted modules give while the host runs."""

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
    """The largest absolute difference of two nested outputs; 0.0 if all bits are equal.

    What is not finite and not the same in both is infinitely far off.
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
    """The floating-point tensors of a nested output."""
    if isinstance(structure, Tensor):
        if structure.is_floating_point():
            yield structure
    elif isinstance(structure, (tuple, list)):
        for item in structure:
            yield from floats(item)
    elif isinstance(structure, dict):
        for item in structure.values():
            yield from floats(item)
