"""Border: the hooks of a module that a graph passes through, as nodes of that graph."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import BackwardHook

from surgery.errors import SpliceError
from surgery.interop import capturing, map_leaves


def run_pre_hooks(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any, BackwardHook | None]:
    """Run the forward pre-hooks of a module that the graph passes through."""
    if capturing():
        return args, kwargs, None
    given = (args, kwargs)
    for key, hook in module._forward_pre_hooks.items():
        if key in module._forward_pre_hooks_with_kwargs:
            changed = hook(module, args, kwargs)
            args, kwargs = (args, kwargs) if changed is None else changed
        else:
            changed = hook(module, args)
            if changed is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
    if module._forward_pre_hooks and _constants((args, kwargs)) != _constants(given):
        raise SpliceError(
            f"a forward pre-hook of {type(module).__name__} changes an argument that is no tensor, "
            "which the spliced forward cannot follow. Put the hook on the module above."
        )
    backward = None
    if module._backward_pre_hooks or module._backward_hooks:
        full, _ = module._get_backward_hooks()  # type: ignore[no-untyped-call]
        backward = BackwardHook(module, full, module._get_backward_pre_hooks())  # type: ignore[no-untyped-call]
        args = backward.setup_input_hook(args)  # type: ignore[no-untyped-call]
    return args, kwargs, backward


def _constants(structure: Any) -> Any:
    return map_leaves(structure, lambda _: "tensor or object")


def run_forward_hooks(module: nn.Module, bound: tuple[Any, Any, Any], output: Any) -> Any:
    """Run the forward hooks of a module that the graph passes through."""
    if capturing():
        return output
    args, kwargs, backward = bound
    for key, hook in module._forward_hooks.items():
        if key in module._forward_hooks_with_kwargs:
            changed = hook(module, args, kwargs, output)
        else:
            changed = hook(module, args, output)
        output = output if changed is None else changed
    return backward.setup_output_hook(output) if backward else output
