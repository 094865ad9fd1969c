"""Verify a splice by running one host with the inputs that it was located with.

    start    compare the outputs of the spliced forward with the original's: equal bits, or how
             far apart
    reach    move the inserted parameters off their start and differentiate: a gradient reaches
             every one of them, and every inserted module gets a gradient that is not zero

Verification runs before ``surgery.splice`` returns. A splice that does not do what its method
declares, or that does nothing, is undone and reported.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from surgery.errors import SpliceError
from surgery.host import (
    FlippedTooLate,
    GuardFlipped,
    HostState,
    Variant,
    own_forward,
)
from surgery.interop import (
    detached_copy,
    draw_anew,
    hookless,
    is_integer_tensor,
    leaves,
    map_leaves,
    silenced,
)
from surgery.plugin import ActsOnTokens, Site
from surgery.splicer.outputs import difference, floats, outputs
from surgery.splicer.record import Report


def verify_start(module: nn.Module, variant: Variant, args: Any, kwargs: Any, base: Any) -> Any:
    """Return the largest change of an output that the splice makes: 0.0 means equal bits.

    None where there are no values to compare (the ``meta`` device).
    """

    def forward(*given: Any, **named: Any) -> Any:
        return variant.run(module, module, *leaves((given, named)))

    return difference(base, outputs(module, forward, args, kwargs))


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

    ``others`` are parameters that the children use without owning them; they are moved off their
    start too.

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
    """Raise unless a gradient reaches every inserted parameter when ``forward`` runs the host."""
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
        except (GuardFlipped, FlippedTooLate):  # a branch depends on what is inserted
            if far < 1e-3:
                raise
            return tried(arguments, far / 10)
        return _raise_no_effect(state, children) if found is None else found

    reached = tried((args, kwargs))
    if any(g is not None and not bool((g != 0).any()) for g in reached):
        # The example may be degenerate (a decoder that starts from zeros): try noise.
        with suppress(GuardFlipped, FlippedTooLate):  # noise may take another branch
            again = tried(_noise((args, kwargs), [module.get_submodule(c) for c in children]))
            pairs = zip(reached, again, strict=True)
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
            _raise_no_effect(state, [child])


def gradients(
    forward: Callable[..., Any],
    parameters: list[nn.Parameter],
    arguments: Any,
    far: float = 0.1,
) -> list[Tensor | None] | None:
    """Return gradients at a random point about ``far`` away; the parameters are put back.

    None if no output depends on a parameter.
    """
    before = [(p.detach().clone(), p.requires_grad) for p in parameters]
    try:
        with torch.enable_grad():
            draw_anew()
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


def _noise(arguments: Any, modules: list[nn.Module]) -> Any:
    """Return the arguments with noise added to activations and with every mask open.

    Where a module acts on some tokens alone, these stand in place of the example's.
    """
    moved: dict[int, Tensor] = {}
    tokens = [m.trial_tokens() for m in modules if isinstance(m, ActsOnTokens)]

    def noisy(v: Tensor) -> Tensor:
        if v.dtype == torch.bool and v.dim() > 2:
            return torch.ones_like(v)
        if tokens and is_integer_tensor(v):
            return tokens[0].repeat(v.numel() // len(tokens[0]) + 1)[: v.numel()].view_as(v)
        if not v.is_floating_point():
            return v
        return v + torch.randn_like(v) if bool((v > -1e4).all()) else torch.zeros_like(v)

    return map_leaves(
        arguments, lambda v: moved.setdefault(id(v), noisy(v)) if isinstance(v, Tensor) else v
    )


def _raise_no_effect(state: HostState, children: list[str]) -> NoReturn:
    """Raise the error that inserted modules have no effect."""
    raise SpliceError(
        f"no value of the parameters of {', '.join(children)} changes the output of {state.path}. "
        "Either this forward does not use the edited port, or the output of the inserted module "
        "does not depend on its parameters. Edit another port, or use the parameters in forward."
    )


def _random_sum(tensor: Tensor) -> Tensor:
    """Return a random linear function of ``tensor``, whose gradient is zero nowhere."""
    return (tensor.float() * torch.randn(tensor.shape, device=tensor.device)).sum()


def verify_together(model: nn.Module, report: Report, others: list[Site]) -> None:
    """Raise unless a gradient reaches every parameter of the methods with ``together``.

    Each parameter is verified in one run of the trunk that it is in.
    """
    trunks = {site.path: site for site in others if site.kind == "trunk"}
    parts: dict[str, list[str]] = {}
    for i in report.inserted:
        above = [path for path in trunks if not path or f"{i.path}.".startswith(f"{path}.")]
        if i.method.together and above:
            parts.setdefault(max(above, key=len), []).append(i.path)
    for path, children in parts.items():
        _verify_trunk(model, trunks[path], children, report)


def _verify_trunk(model: nn.Module, trunk: Site, children: list[str], report: Report) -> None:
    """Raise unless a gradient reaches every parameter of ``children`` when the trunk runs."""
    assert trunk.host is not None
    module, given = model.get_submodule(trunk.path), (trunk.host.args, trunk.host.kwargs)
    named = [
        (f"{child}.{name}", parameter)
        for child in children
        for name, parameter in model.get_submodule(child).named_parameters()
    ]
    if not named or named[0][1].is_meta:
        return
    parameters = [parameter for _, parameter in named]
    with hookless(module):
        base = _plain(module, own_forward(module), given)
        now = _plain(module, module.forward, given)
        longer = any(method.lengthens for method in report.methods)
        if trunk.role != "encoder" and not longer:  # what an encoder gives to a decoder may be
            _require_shapes(trunk.path, base, now)
        report.change[trunk.path] = difference(base, now)
        found = gradients(module.forward, parameters, given)
    for (name, _), gradient in zip(named, found or [None] * len(named), strict=True):
        if gradient is None or not bool((gradient != 0).any()):
            raise SpliceError(
                f"no value of {name} changes the output of {trunk.path or 'the model'}. "
                "Choose other sites with at=."
            )


def _require_shapes(path: str, base: Any, now: Any) -> None:
    """Raise unless the outputs of a trunk have the shapes that those of the base have."""
    for x, y in zip(floats(base), floats(now), strict=True):
        if x.shape != y.shape:
            raise SpliceError(
                f"{path or 'the model'}: an output of shape {tuple(x.shape)} would become "
                f"{tuple(y.shape)}, so what reads it would fail. Leave this module out with at=, "
                "or use a method that adds no tokens, such as 'prefix'."
            )


def _plain(module: nn.Module, forward: Callable[..., Any], given: Any) -> Any:
    """Run ``forward`` on copies of the arguments, without gradients."""
    with torch.no_grad():
        args, kwargs = detached_copy(given)
        return forward(*args, **kwargs)
