"""Verify: what a splice did, tried out on one host with the inputs it was seen with.

    start    outputs of the spliced forward against the original's: equal bits, or how far off
    reach    with the inserted parameters moved off their start, a gradient reaches every one of
             them, and every inserted module gets one that is not zero

It runs before ``surgery.splice`` returns; a splice that does not do what its method declares, or
does nothing, is undone and reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from surgery.errors import SpliceError
from surgery.host import HostState, original_class, run, run_graph, state_of
from surgery.quiet import silenced
from surgery.sites import Edit
from surgery.values import detached_copy, leaves, map_leaves
from surgery.variant import FlippedTooLate, GuardFlipped, Variant


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


def verify_start(module: nn.Module, variant: Variant, args: Any, kwargs: Any, base: Any) -> Any:
    """The largest difference that the splice makes to an output: 0.0 means equal bits.

    None where there are no values to compare (the ``meta`` device).
    """

    def forward(*given: Any, **named: Any) -> Any:
        return variant.run(module, module, *leaves((given, named)))

    return difference(base, outputs(module, forward, args, kwargs))


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


def verify_reach(
    module: nn.Module,
    state: HostState,
    variant: Variant,
    children: list[str],
    others: list[nn.Parameter],
    args: Any,
    kwargs: Any,
) -> None:
    """Raise unless a gradient reaches every inserted parameter of ``children``.

    ``others`` are parameters that they use without owning them: moved off their start, too.

    Raises:
        SpliceError: a parameter is not used, or a module cannot change the output.
    """

    def forward(*given: Any, **named: Any) -> Any:
        return variant.run(module, module, *leaves((given, named)))

    verify_wraps(module, state, forward, children, others, args, kwargs)


def verify_wraps(
    module: nn.Module,
    state: HostState,
    forward: Callable[..., Any],
    children: list[str],
    others: list[nn.Parameter],
    args: Any,
    kwargs: Any,
) -> None:
    """:func:`verify_reach` for any forward."""
    named = [
        (child, name, parameter)
        for child in children
        for name, parameter in module.get_submodule(child).named_parameters()
    ]
    parameters = [parameter for _, _, parameter in named]
    known = set(map(id, parameters))
    parameters += [parameter for parameter in others if id(parameter) not in known]
    if not named or parameters[0].is_meta:
        return

    def tried(arguments: Any, far: float = 0.1) -> list[Tensor | None]:
        try:
            with silenced(module):
                found = gradients(forward, parameters, arguments, far)
        except (GuardFlipped, FlippedTooLate):  # a branch that depends on what is inserted
            if far < 1e-3:
                raise
            return tried(arguments, far / 10)
        return _dead(state, children) if found is None else found

    reached = tried((args, kwargs))
    if any(g is not None and not bool((g != 0).any()) for g in reached):
        # The example may be degenerate (a decoder that starts from zeros): try noise instead.
        with suppress(GuardFlipped, FlippedTooLate):  # of noise, another branch may be right
            pairs = zip(reached, tried(_noise((args, kwargs))), strict=True)
            reached = [b if a is not None and not bool((a != 0).any()) else a for a, b in pairs]
    for (child, name, _), gradient in zip(named, reached, strict=False):
        if gradient is None:
            raise SpliceError(
                f"{state.path}: no gradient reaches {child}.{name}. The inserted module does not "
                "use it; remove the parameter or use it in forward."
            )
    for child in children:
        mine = [g for (c, _, _), g in zip(named, reached, strict=False) if c == child]
        if mine and not any(bool((g != 0).any()) for g in mine if g is not None):
            _dead(state, [child])


def gradients(
    forward: Callable[..., Any],
    parameters: list[nn.Parameter],
    arguments: Any,
    far: float = 0.1,
) -> list[Tensor | None] | None:
    """Gradients at a random point of parameters, about as ``far`` off, which are put back.

    None if there are none.
    """
    before = [(p.detach().clone(), p.requires_grad) for p in parameters]
    try:
        with torch.enable_grad():
            torch.manual_seed(0)
            for parameter in parameters:
                parameter.requires_grad_(True)
                with torch.no_grad():
                    parameter.add_(torch.randn_like(parameter) * far)
            args, kwargs = detached_copy(arguments)
            output = forward(*args, **kwargs)
            loss = sum((_random_sum(t) for t in floats(output) if t.requires_grad), torch.zeros(()))
            if not loss.requires_grad:
                return None
            return list(torch.autograd.grad(loss, parameters, allow_unused=True))
    finally:
        with torch.no_grad():
            for parameter, (old, wanted) in zip(parameters, before, strict=True):
                parameter.copy_(old)
                parameter.requires_grad_(wanted)


def _noise(arguments: Any) -> Any:
    """The arguments with noise added to activations, and with masks open."""
    moved: dict[int, Tensor] = {}

    def noisy(v: Tensor) -> Tensor:
        if v.dtype == torch.bool and v.dim() > 2:
            return torch.ones_like(v)
        if not v.is_floating_point():
            return v
        return v + torch.randn_like(v) if bool((v > -1e4).all()) else torch.zeros_like(v)

    return map_leaves(
        arguments, lambda v: moved.setdefault(id(v), noisy(v)) if isinstance(v, Tensor) else v
    )


def _dead(state: HostState, children: list[str]) -> NoReturn:
    raise SpliceError(
        f"{state.path}: {', '.join(children)} cannot change the output of this forward, wherever "
        "its parameters stand. Either the port that it edits is not used here, or what it gives "
        "does not depend on its parameters."
    )


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


def _random_sum(tensor: Tensor) -> Tensor:
    return (tensor.float() * torch.randn(tensor.shape, device=tensor.device)).sum()
