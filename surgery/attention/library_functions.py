"""Kept whole: an attention function that a graph calls as it is, and the logsumexp of its scores.

Such a function (transformers' own, or one that a user has registered) branches on what it is given,
so a graph calls it instead of following it. Where it calls SDPA by name, that name leads to our
core; elsewhere its operations are watched for a softmax.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgery.attention.sdpa import attention, logsumexp

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


_SOFTMAX = (torch.softmax, F.softmax, Tensor.softmax)


class _ReadLse(TorchFunctionMode):
    """While active, an SDPA call, or the first softmax, inside leaves its logsumexp in ``lse``.

    Scores that had their row maximum subtracted first, for stability, count as they were before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lse: Tensor | None = None
        self._grad = torch.is_grad_enabled()
        self._tops: list[Any] = []
        self._shifted: list[tuple[Tensor, Tensor]] = []  # (scores - row maximum, scores)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled() != self._grad:  # inside an autograd function: no gradient here
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            context, self.lse = attention(*args, **kwargs)
            return context
        if func in _SOFTMAX and self.lse is None:
            before = [scores for shifted, scores in self._shifted if shifted is args[0]]
            self.lse = logsumexp(before[0] if before else args[0])
        result = func(*args, **kwargs)
        name = func.__name__
        if name in ("max", "amax"):
            self._tops.append(getattr(result, "values", result))
        elif name in ("sub", "__sub__") and any(args[1] is top for top in self._tops):
            self._shifted.append((result, args[0]))
        return result


def with_lse(function: Callable[..., Any]) -> Callable[..., tuple[Any, Tensor]]:
    """An attention function that also returns the logsumexp of the scores it normalised.

    ``function(module, query, key, value, mask, ...)`` may use SDPA or a softmax of its own; a
    learned sink that it appends to its scores counts, as it takes part in the softmax.

    Returns:
        a function that returns what ``function`` does, and lse (B, H, n).
    """
    direct, seen = _direct(function, names_of(function))

    def both(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal direct
        lse = None
        now = direct
        if now is not None and not torch.compiler.is_compiling():
            seen.lse = None
            result = now(module, query, *args, **kwargs)
            lse, seen.lse = seen.lse, None  # it may carry history
            if lse is None:  # a branch of it calls no SDPA: from now on it is watched
                direct = None
        if lse is None:
            watch = _ReadLse()
            with watch:
                result = function(module, query, *args, **kwargs)
            lse = watch.lse
        if lse is None:
            raise RuntimeError(
                f"{name} shows neither a softmax nor an SDPA call, so its logsumexp cannot be had. "
                "Load the model with attn_implementation='sdpa' or 'eager', or use methods that "
                "do not read 'lse' (lora, FFN adapters)."
            )
        rows = query.shape[:-1]  # some wrappers fold a group of heads into the query axis
        return result, lse if lse.shape == rows else lse.reshape(rows)

    name = getattr(function, "__name__", "attention")
    both.__name__ = f"{name}_with_lse"
    return both


@functools.lru_cache(maxsize=64)  # one for all layers: what was just used is near
def _direct(
    function: Callable[..., Any], names: tuple[int, ...]
) -> tuple[Callable[..., Any] | None, threading.local]:
    """``function`` with our core for SDPA, and where that leaves its logsumexp."""
    seen = threading.local()

    def sdpa(*args: Any, **kwargs: Any) -> Tensor:
        made: tuple[Tensor, Tensor] = attention(*args, **kwargs)
        seen.lse = made[1]
        return made[0]

    return rebound(function, sdpa), seen
