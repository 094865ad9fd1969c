"""All knowledge of torch's fused inference path for ``nn.MultiheadAttention`` and its encoders.

In evaluation without gradients ``nn.TransformerEncoderLayer`` hands its weights to one fused
kernel, which never calls its submodules: what is spliced into them would train, and then do
nothing. So the path is closed while the model is looked at, and above every host for as long as
something is spliced in. A layer with hooks inside does not take it; an encoder is told so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# For ``patched``: attention runs as plain operations, and each of them is seen.
OPEN: list[tuple[Any, str, Callable[[Any], Any]]] = [
    (torch.backends.mha, "get_fastpath_enabled", lambda original: lambda: False),
    (F, "has_torch_function", lambda original: lambda tensors: False),
]


def close(model: nn.Module, path: str) -> set[str]:
    """Keep the fused path from bypassing the host at ``path``.

    Returns:
        the paths of encoders whose nested-tensor path was on and is now off.
    """
    names = path.split(".") if path else []
    above = [".".join(names[:i]) for i in range(len(names) + 1)]
    modules = {each: model.get_submodule(each) for each in above}
    host = modules[path]
    fused = any(isinstance(module, nn.TransformerEncoderLayer) for module in modules.values())
    if fused and _seen not in host._forward_pre_hooks.values():
        host.register_forward_pre_hook(_seen)
    closed = set()
    for each, module in modules.items():
        nested = isinstance(module, nn.TransformerEncoder) and getattr(
            module, "use_nested_tensor", False
        )
        if nested:
            vars(module)["use_nested_tensor"] = False
            closed.add(each)
    return closed


def reopen(model: nn.Module, closed: set[str], is_host: Callable[[nn.Module], bool]) -> set[str]:
    """Undo :func:`close` wherever no host is left below.

    Returns:
        the paths among ``closed`` that are open again.
    """
    for module in model.modules():
        hooks = module._forward_pre_hooks
        if _seen in hooks.values() and not is_host(module):
            del hooks[next(key for key, hook in hooks.items() if hook is _seen)]
    opened = set()
    for path in closed:
        encoder = model.get_submodule(path)
        if not any(map(is_host, encoder.modules())):
            vars(encoder)["use_nested_tensor"] = True
            opened.add(path)
    return opened


def _seen(module: nn.Module, args: Any) -> None:
    """A hook that does nothing but be there."""
