"""Run the hooks of modules that a graph inlines, by the rules of ``torch.nn.Module.__call__``.

A graph calls some modules whole and traces through others. ``Module.__call__`` of a module that is
traced through never runs, so its hooks would be silent. Two nodes of the graph stand for it:

    bound  = run_pre_hooks(module, args, kwargs)      pre-hooks, and the backward hooks' entry
    ...                                               the nodes of the module's own forward
    output = run_forward_hooks(module, bound, output) forward hooks, and the backward hooks' exit

Both follow ``torch.nn.modules.module.Module._call_impl``: global hooks come first, keyword
arguments go to hooks that asked for them, and hooks with ``always_call=True`` run after an
exception too. ``torch`` keeps the tables of hooks under private names; docs/private_api.md lists
them. While a capture runs, no hook fires.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import BackwardHook

from surgery.errors import ForwardError
from surgery.interop import capturing, map_leaves

_GLOBAL_PRE = torch_module._global_forward_pre_hooks
_GLOBAL_FORWARD = torch_module._global_forward_hooks
_GLOBAL_WITH_KWARGS = torch_module._global_forward_hooks_with_kwargs
_GLOBAL_ALWAYS = torch_module._global_forward_hooks_always_called
_GLOBAL_BACKWARD = torch_module._global_backward_hooks
_GLOBAL_BACKWARD_PRE = torch_module._global_backward_pre_hooks


class Bound(NamedTuple):
    """The arguments of an inlined module after its pre-hooks, and its backward hooks."""

    args: Any
    kwargs: Any
    hooked: bool = False  # torch decides once, when the call begins
    backward: BackwardHook | None = None
    non_full: Any = ()  # backward hooks of the deprecated kind
    entry: Any = None  # of a module with hooks that are always called


@dataclass(eq=False)
class _Entry:
    """An inlined module whose ``always_call`` hooks are still to run.

    Attributes:
        args, kwargs, output: what the hooks would be called with, as far as the forward came.
        called: the hooks that have run.
    """

    module: nn.Module
    args: Any
    kwargs: Any
    output: Any = None
    called: set[int] = field(default_factory=set)


class _Entered(threading.local):
    def __init__(self) -> None:
        self.stack: list[_Entry] = []


_entered = _Entered()


def run_pre_hooks(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
    """Run the forward pre-hooks of an inlined module, and set up its backward hooks.

    Raises:
        ForwardError: a hook changes an argument that is not a tensor. The graph has such values as
            constants and cannot follow.
    """
    if not _hooked(module) or capturing():
        return Bound(args, kwargs)
    entry = None
    if module._forward_hooks_always_called or _GLOBAL_ALWAYS:
        entry = _Entry(module, args, kwargs)
        _entered.stack.append(entry)
    given, touched = (args, kwargs), False
    for key, hook in (*_GLOBAL_PRE.items(), *module._forward_pre_hooks.items()):
        if key in module._forward_pre_hooks_with_kwargs:
            changed: Any = hook(module, args, kwargs)
            if changed is not None:
                if not isinstance(changed, tuple) or len(changed) != 2:
                    raise RuntimeError(
                        "forward pre-hook must return None or a tuple of (new_args, new_kwargs), "
                        f"but got {changed}."
                    )
                args, kwargs = changed
        else:
            changed = hook(module, args)
            if changed is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
        touched = touched or changed is not None
    if touched and _constants((args, kwargs)) != _constants(given):
        raise ForwardError(
            f"a forward pre-hook of {type(module).__name__} changes an argument that is not a "
            "tensor, which the spliced forward cannot follow. Put the hook on the module above."
        )
    full, non_full = module._get_backward_hooks()  # type: ignore[no-untyped-call]
    pre = module._get_backward_pre_hooks()  # type: ignore[no-untyped-call]
    backward = None
    if full or pre:
        backward = BackwardHook(module, full, pre)
        args = backward.setup_input_hook(args)  # type: ignore[no-untyped-call]
    if entry is not None:
        entry.args, entry.kwargs = args, kwargs
    return Bound(args, kwargs, True, backward, non_full, entry)


def run_forward_hooks(module: nn.Module, bound: Bound, output: Any) -> Any:
    """Run the forward hooks of an inlined module, and attach its backward hooks."""
    if not bound.hooked or capturing():
        return output
    entry = bound.entry
    for key, hook in (*_GLOBAL_FORWARD.items(), *module._forward_hooks.items()):
        if entry is not None:
            entry.output = output
            entry.called.add(key)
        output = _after_hook(module, key, hook, bound.args, bound.kwargs, output)
    if bound.backward is not None:
        if not isinstance(output, (Tensor, tuple)):
            warnings.warn(
                "For backward hooks to be called, module output should be a Tensor or a tuple of "
                f"Tensors but received {type(output)}",
                stacklevel=2,
            )
        output = bound.backward.setup_output_hook(output)  # type: ignore[no-untyped-call]
    if bound.non_full:
        _attach_non_full(module, bound, output)
    if entry is not None:
        del _entered.stack[_entered.stack.index(entry) :]  # and entries of an abandoned graph
    return output


def run_always_called_hooks(host: nn.Module) -> None:
    """After an exception in a host's graph: run the hooks that asked to be called always.

    As in torch, such a hook gets the output as far as it was computed (None if the forward itself
    failed), its result goes to the next hook, and an exception in it is a warning.
    """
    inside = set(host.modules()) if _entered.stack else ()
    while _entered.stack and _entered.stack[-1].module in inside:
        entry = _entered.stack.pop()
        module = entry.module
        asked = {**_GLOBAL_ALWAYS, **module._forward_hooks_always_called}
        every = {**_GLOBAL_FORWARD, **module._forward_hooks}
        hooks = {key: hook for key, hook in every.items() if key in asked}
        for key, hook in hooks.items():
            if key in entry.called:
                continue
            try:
                entry.output = _after_hook(
                    module, key, hook, entry.args, entry.kwargs, entry.output
                )
            except Exception as error:
                warnings.warn(
                    f"a forward hook of {type(module).__name__} with always_call=True raised "
                    f"{error!r} after the forward had failed; the first error is raised.",
                    stacklevel=2,
                )


def _hooked(module: nn.Module) -> Any:
    """Whether torch would run any hook around this module (its own test, in its order)."""
    return (
        module._backward_hooks
        or module._backward_pre_hooks
        or module._forward_hooks
        or module._forward_pre_hooks
        or _GLOBAL_BACKWARD_PRE
        or _GLOBAL_BACKWARD
        or _GLOBAL_FORWARD
        or _GLOBAL_PRE
    )


def _after_hook(module: nn.Module, key: int, hook: Any, args: Any, kwargs: Any, output: Any) -> Any:
    """Call one forward hook, and return the output that it leaves."""
    if key in module._forward_hooks_with_kwargs or key in _GLOBAL_WITH_KWARGS:
        changed = hook(module, args, kwargs, output)
    else:
        changed = hook(module, args, output)
    return output if changed is None else changed


def _attach_non_full(module: nn.Module, bound: Bound, output: Any) -> None:
    """Attach backward hooks of ``register_backward_hook`` to the first tensor of the output."""
    first = output
    while not isinstance(first, Tensor):
        is_dict = isinstance(first, dict)
        first = next(x for x in first.values() if isinstance(x, Tensor)) if is_dict else first[0]
    if first.grad_fn is not None:
        for hook in bound.non_full:
            first.grad_fn.register_hook(torch_module._WrappedHook(hook, module))
        module._maybe_warn_non_full_backward_hook(bound.args, output, first.grad_fn)


def _constants(structure: Any) -> Any:
    return map_leaves(structure, lambda x: x if type(x) is str else "tensor or object")
