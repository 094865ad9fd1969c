"""Deal with parameters that are elsewhere between forwards.

accelerate moves parameters to the CPU or the disk until a forward needs them. Such a parameter is
on the meta device between forwards, and a hook of its module (``_hf_hook``) knows where the numbers
are. Parameters that FSDP2 has sharded are gathered while a splice looks at them (sharding.py).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from surgery.errors import SpliceError
from surgery.interop.sharding import gathered, is_sharded
from surgery.interop.tensor_parallel import divided_parameter, undivided, why_never_whole
from surgery.interop.zero_partitions import has_engine, is_of_zero

_ENGINE = (
    "DeepSpeed's engine has taken its parameters apart (ZeRO-3), and its optimizer knows no "
    "others. Do this before deepspeed.initialize, or call engine.destroy() first and "
    "deepspeed.initialize again afterwards."
)


def out_of_reach(model: nn.Module, but_in_memory: bool = False) -> str:
    """Return why the weights of a model cannot be read or written here; "" if they can.

    The text says what to do.

    Args:
        but_in_memory: parameters that are offloaded to the memory of the CPU are within reach, by
            :func:`stored_parameters`.
    """
    for path, module in model.named_modules():
        if _is_offloaded(module) and not (but_in_memory and _stored(module) is not None):
            return (
                f"accelerate has offloaded the parameters of {path or 'the model'}. Do this before "
                "the model is offloaded, or take the hooks off first: "
                "accelerate.hooks.remove_hook_from_submodules(model)."
            )
        if any(map(is_sharded, module.parameters(recurse=False))):
            if has_engine(model):
                return _ENGINE
            return (
                f"the parameters of {path or 'the model'} are sharded. Do this before the model is "
                "sharded (fully_shard, tensor parallelism, deepspeed.initialize)."
            )
    return ""


def stored_parameters(model: nn.Module) -> dict[str, Any]:
    """Return the parameters by name, tied ones under each name, those offloaded to memory, too.

    What is written to them is what later forwards compute with.
    """
    found: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        if _is_offloaded(module):
            for name, tensor in (_stored(module) or {}).items():
                found[f"{path}.{name}" if path else name] = tensor
    return found


def _stored(module: nn.Module) -> dict[str, Tensor] | None:
    """Return the tensors in memory behind the offloaded parameters of a module.

    None if accelerate reads them from the disk each time, or keeps them in a way unknown here.
    """
    store = getattr(vars(module).get("_hf_hook"), "weights_map", None)
    found: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.is_meta:
            try:
                once, again = store[name], store[name]  # type: ignore[index]
            except (TypeError, KeyError):
                return None
            if once.data_ptr() != again.data_ptr():
                return None
            found[name] = once
    return found


def require_no_engine(model: nn.Module, what: str) -> None:
    """Raise if DeepSpeed's engine trains a model in parts, and would not train what is new in it.

    Raises:
        SpliceError: it does.
    """
    if has_engine(model):
        raise SpliceError(f"{what} fails on this {type(model).__name__}: {_ENGINE}")


def explained_out_of_reach(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function(model, ...)`` with weights whole; its errors say so if they are not."""

    @functools.wraps(function)
    def run(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        require_no_engine(model, function.__name__.lstrip("_"))
        split = ""
        try:
            with gathered(model):
                split = divided_parameter(model)
                why_not = why_never_whole(model) if split else ""
                if not why_not:
                    with undivided(model) if split else nullcontext():
                        return function(model, *args, **kwargs)
        except Exception as error:
            reason = (
                "" if split or any(map(is_of_zero, model.parameters())) else out_of_reach(model)
            )
            if not reason:
                raise
            name = function.__name__.lstrip("_")
            raise SpliceError(f"{name} fails on this {type(model).__name__}: {reason}") from error
        raise SpliceError(
            f"tensor parallelism has split {split} over processes, and a splice cannot see the "
            f"model whole: {why_not}. Load the base with tp_plan='auto' over one axis of "
            "processes, or without tp_plan= (fully_shard may shard it). To run an adapter there, "
            "merge it into a whole base, save that, and load it with tp_plan=."
        )

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
