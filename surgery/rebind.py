"""Rebind: an attention function whose own call of SDPA also gives us the logsumexp.

The function runs as it is written; only the name by which it finds SDPA leads elsewhere. That costs
nothing per operation, where watching every operation does.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SDPA = "scaled_dot_product_attention"


class _Namespace:
    """A module, but for some of its attributes."""

    def __init__(self, module: Any, **others: Any) -> None:
        self.__dict__.update(others)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def rebound(
    function: Callable[..., Any], attention: Callable[..., tuple[Tensor, Tensor]]
) -> Callable[..., tuple[Any, Tensor | None]] | None:
    """``function``, which calls SDPA by its name, returning also what ``attention`` gave there.

    None if the function does not call SDPA itself.
    """
    if not isinstance(function, types.FunctionType) or _SDPA not in function.__code__.co_names:
        return None
    seen = threading.local()

    def sdpa(*args: Any, **kwargs: Any) -> Tensor:
        context, seen.lse = attention(*args, **kwargs)
        return context

    functional = _Namespace(F, scaled_dot_product_attention=sdpa)
    layers = _Namespace(nn, functional=functional)
    instead: dict[int, Any] = {
        id(torch): _Namespace(torch, nn=layers),
        id(nn): layers,
        id(F): functional,
    }
    instead[id(F.scaled_dot_product_attention)] = sdpa
    own = {name: instead.get(id(value), value) for name, value in function.__globals__.items()}
    copy = types.FunctionType(
        function.__code__, own, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__

    def both(*args: Any, **kwargs: Any) -> tuple[Any, Tensor | None]:
        seen.lse = None
        result = copy(*args, **kwargs)
        lse, seen.lse = seen.lse, None
        return result, lse

    return both
