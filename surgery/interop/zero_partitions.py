"""Deal with parameters that DeepSpeed's ZeRO-3 has taken apart.

    zero.Init, or a load under it     each process holds a part; a splice gathers them meanwhile
    deepspeed.initialize              likewise, and the engine's hooks gather and free parameters
                                      around each module; its optimizer is fixed

So a model is spliced before ``deepspeed.initialize``, whether it is in parts by then or not. The
engine takes new parameters apart with the others. Between forwards a parameter is an empty tensor.
One that a forward has left whole is written to in vain: its parts are what counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def is_of_zero(tensor: Any) -> bool:
    """Whether ZeRO-3 keeps a parameter in parts, gathered now or not."""
    return hasattr(tensor, "ds_status")


def is_partitioned(tensor: Any) -> bool:
    """Whether ZeRO-3 has taken a parameter apart, and not gathered it now."""
    return getattr(getattr(tensor, "ds_status", None), "name", "") == "NOT_AVAILABLE"


def is_gathered_by_user(tensor: Any) -> bool:
    """Whether the user has gathered a parameter of ZeRO-3 with ``GatheredParameters``."""
    return getattr(tensor, "_ds_z3_gathered_param_context_depth", 0) > 0


def numbers_in(tensor: Any) -> int:
    """Return how many numbers a parameter has, in all processes together."""
    return int(getattr(tensor, "ds_numel", None) or tensor.numel())


def has_engine(model: nn.Module) -> bool:
    """Whether hooks of DeepSpeed's engine gather and free the parameters of a model."""
    return any(
        str(getattr(hook, "__module__", "")).startswith("deepspeed.runtime.zero")
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
    )


@contextmanager
def joined(parameters: Iterable[Any]) -> Iterator[bool]:
    """Make parameters that ZeRO-3 has taken apart whole inside the ``with`` block, for reading.

    Every process must enter the block. It yields whether there are such parameters.
    """
    apart = [p for p in parameters if is_partitioned(p)]
    if not apart:
        yield False
        return
    import deepspeed  # deepspeed.zero is no module of its own

    with deepspeed.zero.GatheredParameters(apart):
        yield True
