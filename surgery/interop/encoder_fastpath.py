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

_CLOSED = "_surgery_closed"


# For ``patched``: attention runs as plain operations, and each of them is seen.
OPEN: list[tuple[Any, str, Callable[[Any], Any]]] = [
    (torch.backends.mha, "get_fastpath_enabled", lambda original: lambda: False),
    (F, "has_torch_function", lambda original: lambda tensors: False),
]


def close(model: nn.Module, path: str) -> None:
    """Keep the fused path from bypassing the host at ``path``."""
    names = path.split(".") if path else []
    above = [model.get_submodule(".".join(names[:i])) for i in range(len(names) + 1)]
    host = above[-1]
    fused = any(isinstance(module, nn.TransformerEncoderLayer) for module in above)
    if fused and _seen not in host._forward_pre_hooks.values():
        host.register_forward_pre_hook(_seen)
    for module in above:
        if isinstance(module, nn.TransformerEncoder) and getattr(
            module, "use_nested_tensor", False
        ):
            module.use_nested_tensor = False
            vars(module)[_CLOSED] = True


def reopen(model: nn.Module, is_host: Callable[[nn.Module], bool]) -> None:
    """Undo :func:`close` wherever no host is left."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        if _seen in hooks.values() and not is_host(module):
            del hooks[next(key for key, hook in hooks.items() if hook is _seen)]
        if _CLOSED in vars(module) and not any(map(is_host, module.modules())):
            vars(module)["use_nested_tensor"] = True
            del vars(module)[_CLOSED]


def _seen(module: nn.Module, args: Any) -> None:
    """A hook that does nothing but be there."""
