"""Count modules of attention and their projections by names of classes, independent of the library.

The names of classes are what the product never looks at, so this count cannot repeat its mistakes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

NAMES = ("attention", "attn", "mhsa", "selfatt", "mha")


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The innermost modules whose class is named after attention."""
    found = {
        path: module
        for path, module in model.named_modules()
        if any(name in type(module).__name__.lower() for name in NAMES)
    }
    return {
        path: module
        for path, module in found.items()
        if not any(other.startswith(f"{path}.") for other in found)
    }


def projections(path: str, module: nn.Module) -> list[str]:
    """The names of the weights of linear layers and 1x1 convolutions in a module."""
    names = []
    for below, part in module.named_modules(prefix=path):
        if isinstance(part, nn.MultiheadAttention) and part.in_proj_weight is not None:
            names.append(f"{below}.in_proj_weight")
        kernel = getattr(part, "kernel_size", None)
        depthwise = getattr(part, "groups", 1) > 1
        one = isinstance(kernel, tuple) and set(kernel) == {1} and not depthwise
        if isinstance(part, nn.Linear) or (one and hasattr(part, "weight")):
            names.append(f"{below}.weight")
    return names


class Softmaxes(TorchFunctionMode):
    """Note which modules compute a softmax of three or more axes."""

    def __init__(self) -> None:
        super().__init__()
        self.stack, self.found = [""], set[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        wide = name == "softmax" and args[0].dim() > 2
        if wide or name in ("scaled_dot_product_attention", "multi_head_attention_forward"):
            self.found.add(self.stack[-1])
        return func(*args, **(kwargs or {}))


def run(model: nn.Module, inputs: dict[str, Any]) -> tuple[set[str], set[str]]:
    """The paths of the modules that one run calls, and of those that compute a softmax."""
    seen, called, handles = Softmaxes(), set[str](), []
    for path, module in model.named_modules():

        def enter(module: Any, args: Any, path: str = path) -> None:
            seen.stack.append(path)
            called.add(path)

        def leave(module: Any, args: Any, out: Any) -> None:
            seen.stack.pop()

        handles += [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave, always_call=True),
        ]
    try:
        with seen, torch.no_grad():
            model(**copy.deepcopy(inputs))
    finally:
        for handle in handles:
            handle.remove()
    return called, seen.found
