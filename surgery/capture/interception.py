"""Replace torch's functions while a forward is captured, so that each call becomes a node.

A torch call comes in by one of two ways:

    Recorder       a ``TorchFunctionMode``: every call that reaches ``__torch_function__``
    intercepted    replaced attributes, for calls that do not reach it with a proxy: functions
                   whose parser rejects a proxy, ``math``, scripted functions, module calls

A third kind of replacement records nothing in the graph: the questions whether gradients or
autocast are on, whose answers the tracer notes, and what watched_state.py replaces.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from surgery.capture.branches import MATH
from surgery.capture.proxy import any_proxy, apply, call
from surgery.capture.tracer import Tracer
from surgery.interop import (
    AttentionPatch,
    LeftOnce,
    deliver,
    encoder_fastpath,
    patched,
    unpatched,
    untouched,
)


class Recorder(LeftOnce, TorchFunctionMode):
    """Make a node of every torch call, also of one without a proxy (factories, parameters).

    Properties and sizes of real tensors are read and not recorded.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        deliver()
        kwargs = kwargs or {}
        func = unpatched(func)
        tracer = self.tracer
        if tracer.executing:
            return func(*args, **kwargs)
        if func is torch._C._set_grad_enabled:
            return tracer.gradient_mode(*args)
        if not any_proxy((args, kwargs)):
            with torch._C.DisableTorchFunction(), torch.no_grad():
                if func.__name__ == "__get__" or func.__name__ in ("__repr__", "__format__"):
                    return func(*args, **kwargs)
            if func.__name__ in ("size", "dim", "numel", "is_floating_point", "get_device"):
                return func(*args, **kwargs)
        if func.__name__ == "__get__":  # a property: Tensor.shape, Tensor.mT, ...
            return getattr(args[0], func.__self__.__name__)
        if torch.overrides.is_tensor_method_or_property(func):
            if func.__name__ == "__setitem__":
                return tracer.create_proxy("call_function", operator.setitem, args, kwargs)
            if func.__name__ == "__getitem__":
                return tracer.create_proxy("call_function", operator.getitem, args, kwargs)
            return tracer.create_proxy("call_method", func.__name__, args, kwargs)
        return tracer.create_proxy("call_function", func, args, kwargs)


# Torch's argument parser inspects arguments before it calls their ``__torch_function__``. A proxy
# must not get that far.
_FUNCTIONS = sorted(
    name
    for name in dir(torch._C._VariableFunctions)
    if not name.startswith("_") and callable(vars(torch).get(name))
)


# Methods that read their size arguments before they look for ``__torch_function__``.
_SIZED = "expand view reshape repeat permute new_zeros new_ones new_empty new_full".split()


@contextmanager
def intercepted(
    module: nn.Module, tracer: Tracer, attention_patch: AttentionPatch | None
) -> Iterator[None]:
    """Put all replacements in place for one capture; restore everything at the end."""

    def kept_whole(function: Callable[..., Any]) -> Callable[..., Any]:
        tracer.passed_to.add(function)

        def attend(*args: Any, **kwargs: Any) -> Any:
            if tracer.executing:
                return function(*args, **kwargs)
            result = tracer.create_proxy("call_function", function, args, kwargs)
            result.node.meta["attention"] = True
            return tracer.unpack(result)

        return attend

    def recorded(kind: str, target: Any = None) -> Callable[..., Any]:
        """Return a replacement that makes a node if a proxy is among the arguments."""

        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                if not tracer.executing and any_proxy((args, kwargs)):
                    return tracer.create_proxy(kind, target or original, args, kwargs)
                return original(*args, **kwargs)

            return run

        return make

    def by_tracer(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda mod, *args, **kwargs: tracer.call_module(mod, args, kwargs)

    replacements: list[Any] = [(nn.Module, "__call__", by_tracer)]
    replacements += encoder_fastpath.WITHOUT_FASTPATH
    replacements += [(torch, name, recorded("call_function")) for name in _FUNCTIONS]
    replacements += [(math, name, recorded("call_function")) for name in MATH]
    replacements += [(torch.Tensor, name, recorded("call_method", name)) for name in _SIZED]
    replacements += [(torch.jit.ScriptFunction, "__call__", recorded("call_function", call))]
    replacements += [(torch.autograd.Function, "apply", recorded("call_function", apply))]
    replacements += [
        (torch, name, tracer.ask) for name in ("is_grad_enabled", "is_autocast_enabled")
    ]
    if attention_patch is not None:
        replacements += attention_patch(kept_whole)
    with untouched(module), patched(*replacements), Recorder(tracer), tracer.watcher.watching():
        yield
