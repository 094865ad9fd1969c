"""Keep torch's fused encoder path from bypassing what is spliced in.

In evaluation without gradients, ``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention`` hand
their weights to one fused kernel and never call their submodules. A module spliced into these
would train, and then do nothing at evaluation. The path is therefore closed twice:

    WITHOUT_FASTPATH replacements for ``patched`` while a model is observed or captured: attention
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

WITHOUT_FASTPATH: list[tuple[Any, str, Callable[[Any], Any]]] = [
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
    if fused and _do_nothing not in host._forward_pre_hooks.values():
        host.register_forward_pre_hook(_do_nothing)
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
        if _do_nothing in hooks.values() and not is_host(module):
            del hooks[next(key for key, hook in hooks.items() if hook is _do_nothing)]
    opened = set()
    for path in closed:
        encoder = model.get_submodule(path)
        if not any(map(is_host, encoder.modules())):
            vars(encoder)["use_nested_tensor"] = True
            opened.add(path)
    return opened


def _do_nothing(module: nn.Module, args: Any) -> None:
    """Be a hook: a layer with a hook inside does not take the fused path."""
