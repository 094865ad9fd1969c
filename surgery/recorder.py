"""Recorder: makes nodes of torch calls that no proxy takes part in."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from surgery.patching import unpatched
from surgery.proxy import any_proxy
from surgery.tracer import Tracer


class Recorder(TorchFunctionMode):
    """Turns torch calls that no proxy takes part in (factories, parameters) into nodes too."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
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
