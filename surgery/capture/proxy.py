"""Define a ``torch.fx`` proxy that carries the example value of its node.

A forward asks the values that it computes with for their truth, length or type, and a graph has no
answer. The value beside the node answers:

    if x.dim() == 3             the value's; no branch, as equal signatures have equal dims
    isinstance(x, Tensor)       the value's class, through the property ``__class__``
    if cache.is_updated         the value's truth; a *branch* records it
    x.shape[0] * 2              a node: sizes stay symbolic
    cache.update(k, v)          a node

An answer that could differ in another call of the same signature becomes a branch, and the graph is
used only where the answer is the same.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

# Attributes and methods of tensors that are read as constants, without a branch: the signature of a
# call fixes them (host/call_signature.py).
_CONSTANT_ATTRIBUTES = frozenset(
    (
        "dtype device ndim layout is_cuda is_cpu is_meta is_sparse is_mkldnn is_quantized "
        "is_nested is_xpu is_mps itemsize names"
    ).split()
)


_CONSTANT_METHODS = frozenset(
    ("dim ndimension is_floating_point is_complex get_device element_size type is_signed").split()
)


IN_PLACE = "iadd isub imul itruediv ifloordiv imod ipow".split()


_COUNTED = frozenset("split chunk unbind tensor_split split_with_sizes tolist".split())


# The methods of fx.Proxy without ``__call__``: models ask ``callable()``, which looks at the class
# alone.
_Operators: type = type(
    "_Operators",
    (),
    {k: v for k, v in vars(fx.Proxy).items() if k not in ("__call__", "__dict__", "__weakref__")},
)


class ValueProxy(_Operators):  # type: ignore[misc]
    """A node and the value that the node has for the example inputs."""

    tracer: Any
    __getitem__: Any

    def __init__(self, node: fx.Node, tracer: Any, value: Any) -> None:
        object.__setattr__(self, "node", node)
        object.__setattr__(self, "tracer", tracer)
        object.__setattr__(self, "value", value)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(object.__getattribute__(self, "value"))

    def __getattr__(self, name: str) -> Any:
        value = self.value
        try:
            attribute = getattr(value, name)
        except AttributeError:  # in the next call another object may have the attribute
            self.tracer.branch(self.node, _lacks(name), True)
            raise
        if isinstance(value, torch.Tensor):
            if name in _CONSTANT_ATTRIBUTES:
                return attribute
            if callable(attribute) and not isinstance(attribute, torch.Tensor):
                return _Method(self, name)
        elif callable(attribute) and not isinstance(attribute, type):
            return _Method(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __setattr__(self, name: str, new: Any) -> None:
        self.tracer.create_proxy("call_function", setattr, (self, name, new), {})

    def __setitem__(self, key: Any, new: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, new), {})

    def __contains__(self, key: Any) -> bool:
        return bool(self.tracer.create_proxy("call_function", operator.contains, (self, key), {}))

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.value, dict):
            return iter(self.tracer.concrete(self, tuple))
        return iter([self[i] for i in range(len(self))])

    def _counts_data(self) -> bool:
        """Whether the number of items depends on sizes or data, not on structure alone."""
        target = self.node.target
        return getattr(target, "__name__", target) in _COUNTED

    def __reversed__(self) -> Iterator[Any]:
        return iter(list(self)[::-1])

    @property
    def keys(self) -> Any:  # fx.Proxy has a method of this name, which would hide the value's
        if isinstance(self.value, dict):
            return lambda: dict.fromkeys(self).keys()
        return self.__getattr__("keys")

    def __len__(self) -> int:
        if isinstance(self.value, torch.Tensor):
            return int(self.shape[0])
        if type(self.value) in (tuple, torch.Size) and not self._counts_data():
            return len(self.value)
        return int(self.tracer.concrete(self, len))

    def __bool__(self) -> bool:
        return bool(self.tracer.concrete(self, bool))

    def __index__(self) -> int:
        return int(self.tracer.concrete(self, operator.index))

    def __int__(self) -> int:
        return int(self.tracer.concrete(self, int))

    def __float__(self) -> float:
        return float(self.tracer.concrete(self, float))

    def __round__(self, digits: int | None = None) -> Any:
        return self.tracer.create_proxy("call_function", round, (self, digits), {})

    def __hash__(self) -> int:
        if isinstance(self.value, (int, float)):
            return int(self.tracer.concrete(self, hash))
        return id(self)

    def __format__(self, spec: str) -> str:
        if isinstance(self.value, (int, float)):
            self.tracer.concrete(self, str)
        return format(str(self.value), "") if not spec else format(self.value, spec)

    def __str__(self) -> str:
        return format(self, "")

    def __repr__(self) -> str:
        return format(self, "")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


@functools.cache
def _lacks(name: str) -> Callable[[Any], bool]:
    """Return the question whether a value lacks this attribute, one function for each name.

    Branches with the same node and question are one; without the cache each would be new.
    """
    return lambda value: not hasattr(value, name)


class _Method:
    """A bound method of a proxied value; calling it makes the node."""

    def __init__(self, owner: ValueProxy, name: str) -> None:
        self.owner, self.name = owner, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = self.owner
        if self.name in _CONSTANT_METHODS and not args and not kwargs:
            if isinstance(owner.value, torch.Tensor):
                return getattr(owner.value, self.name)()
        if self.name == "type" and args:
            args = (args[0].value if is_proxy(args[0]) else args[0], *args[1:])
        return owner.tracer.create_proxy("call_method", self.name, (owner, *args), kwargs)


def _in_place(name: str) -> Callable[[ValueProxy, Any], Any]:
    """Return the method for ``x += y`` and its kin.

    A tensor that the caller gave is changed in place, because the caller sees the change. Any other
    tensor becomes ``x + y`` in the dtype of x.
    """

    def operate(self: ValueProxy, other: Any) -> Any:
        if not isinstance(self.value, torch.Tensor):
            return getattr(operator, name[1:])(self, other)
        if self.node.op == "placeholder":
            in_place = getattr(operator, name)
            return self.tracer.create_proxy("call_function", in_place, (self, other), {})
        result = getattr(operator, name[1:])(self, other)
        return result if result.dtype == self.dtype else result.to(self.dtype)

    return operate


for _name in IN_PLACE:  # fx.Proxy lacks them, and then Python runs ``x = x + y``
    setattr(ValueProxy, f"__{_name}__", _in_place(_name))


class CallableProxy(ValueProxy):
    """A proxy whose value can be called. It has a class of its own for ``callable()``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_function", call, (self, *args), kwargs)


def is_proxy(x: Any) -> bool:
    """Whether ``x`` is a proxy. ``isinstance`` would see the class of the proxy's value."""
    return issubclass(type(x), ValueProxy)


def call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a callable that is a value of the graph; a node needs a function as its target."""
    return function(*args, **kwargs)


def apply(function: Any, *args: Any) -> Any:
    """Apply an autograd function that the model defines; a node needs a function as its target."""
    return function.apply(*args)


def any_proxy(structure: Any) -> bool:
    """Whether there is a proxy among these nested arguments."""
    if is_proxy(structure):
        return True
    if isinstance(structure, (tuple, list)):
        return any(any_proxy(x) for x in structure)
    if isinstance(structure, dict):
        return any(any_proxy(x) for x in structure.values())
    if isinstance(structure, slice):
        return any(any_proxy(x) for x in (structure.start, structure.stop, structure.step))
    return False
