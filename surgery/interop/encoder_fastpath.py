"""Keep torch's fused encoder path from bypassing what is spliced in.

In evaluation without gradients, ``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention`` hand
their weights to one fused kernel and never call their submodules. A module spliced into these
would train, and then do nothing at evaluation. The path is therefore closed twice:

    OPEN             replacements for ``patched`` while a model is observed or captured: attention
                     runs as plain operations, each of which is seen
    close, reopen    above every host, as long as something is spliced into it

A layer does not take the path if a module inside has a hook, so ``close`` gives the host one that
does nothing. ``nn.TransformerEncoder`` turns its input into a nested tensor, which only the fused
kernel can take; ``close`` clears its flag ``use_nested_tensor``, and ``reopen`` sets it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_CLOSED = "_surgery_closed"  # marks an encoder whose flag ``close`` has cleared


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
    if fused and _do_nothing not in host._forward_pre_hooks.values():
        host.register_forward_pre_hook(_do_nothing)
    for module in above:
        if isinstance(module, nn.TransformerEncoder) and getattr(
            module, "use_nested_tensor", False
        ):
            module.use_nested_tensor = False
            vars(module)[_CLOSED] = True


def reopen(model: nn.Module, is_host: Callable[[nn.Module], bool]) -> None:
    """Undo :func:`close` at modules that are not hosts any more, and encoders without hosts."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        if _do_nothing in hooks.values() and not is_host(module):
            del hooks[next(key for key, hook in hooks.items() if hook is _do_nothing)]
        if _CLOSED in vars(module) and not any(map(is_host, module.modules())):
            vars(module)["use_nested_tensor"] = True
            del vars(module)[_CLOSED]


def _do_nothing(module: nn.Module, args: Any) -> None:
    """Be a hook: a layer with a hook inside does not take the fused path."""
