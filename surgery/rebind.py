"""Rebind: an attention function whose own call of SDPA goes through ours.

The function runs as it is written; only the name by which it finds SDPA leads elsewhere. That costs
nothing per operation, where watching every operation does.
"""

from __future__ import annotations

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


def names_of(function: Callable[..., Any]) -> tuple[int, ...]:
    """A function's code, and what the global names in it lead to now, by identity."""
    if not isinstance(function, types.FunctionType):
        return ()
    code, known = function.__code__, function.__globals__
    return id(code), *(id(known.get(name)) for name in code.co_names)


def rebound(function: Callable[..., Any], sdpa: Callable[..., Tensor]) -> Callable[..., Any] | None:
    """``function``, which calls SDPA by its name, calling ``sdpa`` instead.

    None if the function does not call SDPA itself.
    """
    if not isinstance(function, types.FunctionType) or _SDPA not in function.__code__.co_names:
        return None
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
    return copy
