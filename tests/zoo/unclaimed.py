"""Find modules with a softmax that belongs to no attention site."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

import surgery
from tests.zoo.outputs import outputs


class _Softmaxes(TorchFunctionMode):
    """Which modules call SDPA or a softmax over the last of three or more axes?"""

    def __init__(self) -> None:
        super().__init__()
        self.stack, self.found = [""], set[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        wide = name == "softmax" and args[0].dim() > 2 and dim in (-1, args[0].dim() - 1)
        if wide or name in ("scaled_dot_product_attention", "multi_head_attention_forward"):
            self.found.add(self.stack[-1])
        return func(*args, **kwargs)


def unclaimed(model: nn.Module, inputs: dict[str, Any], sites: surgery.Sites) -> list[str]:
    """Modules with a softmax that belongs to no attention site: routers, or something missed."""
    seen, handles = _Softmaxes(), []
    for path, module in model.named_modules():

        def enter(module: Any, args: Any, path: str = path) -> None:
            seen.stack.append(path)

        def leave(module: Any, args: Any, out: Any) -> None:
            seen.stack.pop()

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        with seen:
            outputs(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    claimed = [f"{s.path}.{s.key.partition('#')[0]}".strip(".") for s in sites.attention]
    return sorted(p for p in seen.found if not any(f"{p}.".startswith(f"{c}.") for c in claimed))
