"""Deal with parameters that are elsewhere between forwards.

accelerate moves parameters to the CPU or the disk until a forward needs them. Such a parameter is
on the meta device between forwards, and a hook of its module (``_hf_hook``) knows where the numbers
are. Parameters that FSDP2 has sharded are gathered while a splice looks at them (sharding.py).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from surgery.errors import SpliceError
from surgery.interop.sharding import gathered


def out_of_reach(model: nn.Module) -> str:
    """Return why the weights of a model cannot be read or written here; "" if they can.

    The text says what to do.
    """
    for path, module in model.named_modules():
        if _is_offloaded(module):
            return (
                f"accelerate has offloaded the parameters of {path or 'the model'}. Do this before "
                "the model is offloaded, or take the hooks off first: "
                "accelerate.hooks.remove_hook_from_submodules(model)."
            )
        if any(hasattr(p, "full_tensor") for p in module.parameters(recurse=False)):
            return (
                f"the parameters of {path or 'the model'} are sharded. Do this before the model is "
                "sharded (fully_shard, tensor parallelism)."
            )
    return ""


def explained_out_of_reach(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function(model, ...)`` with weights gathered; its errors say so if they are not."""

    @functools.wraps(function)
    def run(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            with gathered(model):
                return function(model, *args, **kwargs)
        except Exception as error:
            reason = out_of_reach(model)
            if not reason:
                raise
            name = function.__name__.lstrip("_")
            raise SpliceError(f"{name} fails on this {type(model).__name__}: {reason}") from error

    return run


@contextmanager
def onloaded(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Bring the parameters of these modules, and of what they contain, to their device."""
    with ExitStack() as stack:
        for module in modules:
            for each in module.modules():
                if _is_offloaded(each):
                    from accelerate.utils import align_module_device

                    stack.enter_context(align_module_device(each))
        yield


def _is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of accelerate holds this module's own parameters."""
    hook: Any = vars(module).get("_hf_hook")
    hooks = [hook, *getattr(hook, "hooks", ())]
    away = any(p.is_meta for p in module.parameters(recurse=False))
    return away and "accelerate" in sys.modules and any(getattr(h, "offload", False) for h in hooks)
