"""Wrap a library's attention function so that it also returns the logsumexp of its scores.

Such a function (one of transformers, or one that a user has registered) branches on its arguments,
so a captured graph calls it as one node instead of tracing into it. There are two ways to its lse:

1. Rebind. If its code names SDPA, a copy of the function is made in whose globals SDPA is
   :func:`surgery.attention.attention`. Nothing is patched, so other callers are unaffected.
2. Watch. Else it runs under a mode that sees each torch function. The mode computes the logsumexp
   of the scores that the first softmax normalises, at the cost of a Python call per operation.

The first way fails if the function reaches SDPA through another function; then no lse is recorded,
and the second way takes over. Under torch.compile only the second is used.
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
from surgery.errors import ForwardError

_SDPA = "scaled_dot_product_attention"


class _Namespace:
    """A view of a module with some of its attributes replaced."""

    def __init__(self, module: Any, **others: Any) -> None:
        self.__dict__.update(others)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _code_and_globals(function: Callable[..., Any]) -> tuple[int, ...]:
    """Return the ids of a function's code and of the globals that it names, as a cache key."""
    if not isinstance(function, types.FunctionType):
        return ()
    code, known = function.__code__, function.__globals__
    return id(code), *(id(known.get(name)) for name in code.co_names)


def _rebound(
    function: Callable[..., Any], sdpa: Callable[..., Tensor]
) -> Callable[..., Any] | None:
    """Return a copy of ``function`` that calls ``sdpa`` where the original calls SDPA.

    The copy has globals of its own, in which ``torch``, ``torch.nn``, ``torch.nn.functional`` and
    SDPA are replaced. The result is None if the code of ``function`` does not name SDPA.
    """
    if not isinstance(function, types.FunctionType) or _SDPA not in function.__code__.co_names:
        return None
    functional = _Namespace(F, scaled_dot_product_attention=sdpa)
    layers = _Namespace(nn, functional=functional)
    replaced: dict[int, Any] = {
        id(torch): _Namespace(torch, nn=layers),
        id(nn): layers,
        id(F): functional,
    }
    replaced[id(F.scaled_dot_product_attention)] = sdpa
    new_globals = {
        name: replaced.get(id(value), value) for name, value in function.__globals__.items()
    }
    copy = types.FunctionType(
        function.__code__,
        new_globals,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_SOFTMAX = (torch.softmax, F.softmax, Tensor.softmax)


class _ReadLse(TorchFunctionMode):
    """While active, record in ``lse`` the logsumexp of an SDPA call or of the first softmax.

    Some functions subtract the row maximum from the scores before their softmax, for stability.
    Then the logsumexp is that of the scores before the subtraction.
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
        # Inside an autograd function gradients are off, and lse would have none.
        if torch.is_grad_enabled() != self._grad:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            context, self.lse = attention(*args, **kwargs)
            return context
        if func in _SOFTMAX and self.lse is None:
            unshifted = [scores for shifted, scores in self._shifted if shifted is args[0]]
            self.lse = logsumexp(unshifted[0] if unshifted else args[0])
        result = func(*args, **kwargs)
        name = func.__name__
        if name in ("max", "amax"):
            self._tops.append(getattr(result, "values", result))
        elif name in ("sub", "__sub__") and any(args[1] is top for top in self._tops):
            self._shifted.append((result, args[0]))
        return result


def with_lse(function: Callable[..., Any]) -> Callable[..., tuple[Any, Tensor]]:
    """Wrap an attention function so that it also returns the logsumexp of its scores.

    ``function(module, query, key, value, mask, ...)`` may use SDPA or a softmax of its own. A
    learned sink that it appends to its scores is part of the softmax and so of the logsumexp.

    Returns:
        a function that returns the result of ``function`` and lse (B, H, n).

    Raises:
        ForwardError: in a call that shows neither an SDPA call nor a softmax.
    """
    rebound_function, slot = _rebound_to_attention(function, _code_and_globals(function))

    def call_with_lse(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal rebound_function
        lse = None
        call_rebound = rebound_function
        if call_rebound is not None and not torch.compiler.is_compiling():
            slot.lse = None
            result = call_rebound(module, query, *args, **kwargs)
            lse, slot.lse = slot.lse, None  # lse may hold an autograd graph alive
            if lse is None:  # this call did not reach SDPA: watch the function from now on
                rebound_function = None
        if lse is None:
            watcher = _ReadLse()
            with watcher:
                result = function(module, query, *args, **kwargs)
            lse = watcher.lse
        if lse is None:
            raise ForwardError(
                f"{name} shows neither a softmax nor an SDPA call, so its logsumexp cannot be had. "
                "Load the model with attn_implementation='sdpa' or 'eager', or use methods that "
                "do not read 'lse' (lora, FFN adapters)."
            )
        rows = query.shape[:-1]  # some functions fold a group of heads into the query axis
        return result, lse if lse.shape == rows else lse.reshape(rows)

    name = getattr(function, "__name__", "attention")
    call_with_lse.calls_sdpa = rebound_function is not None  # type: ignore[attr-defined]
    call_with_lse.plain = function  # type: ignore[attr-defined]
    call_with_lse.__name__ = f"{name}_with_lse"
    return call_with_lse


@functools.lru_cache(maxsize=64)  # layers share a copy, whose code then stays in the CPU's cache
def _rebound_to_attention(
    function: Callable[..., Any], names: tuple[int, ...]
) -> tuple[Callable[..., Any] | None, threading.local]:
    """Return ``function`` rebound to :func:`attention`, and the slot in which that leaves lse.

    The slot is per thread, so that threads that run one function do not mix their logsumexps.
    ``names`` is part of the cache key: a global that is replaced later makes another copy.
    """
    slot = threading.local()

    def sdpa(*args: Any, **kwargs: Any) -> Tensor:
        outputs: tuple[Tensor, Tensor] = attention(*args, **kwargs)
        slot.lse = outputs[1]
        return outputs[0]

    return _rebound(function, sdpa), slot
