"""Make operations on a model atomic: an exception at any line leaves the model as it was.

    before = everything that an operation may change, copied shallowly
    operate
    | any exception, Ctrl-C included
    v
    put back

Copied are, for each module, its class, its attributes and the containers in which torch keeps
children, parameters and hooks; the library's record and the states of hosts; the gradient hooks of
parameters and whether they are trained; and the values of tensors that the operation overwrites.
One operation runs at a time; those of other threads wait.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from surgery.host import HostState, state_of
from surgery.interop import exclusively, put_items_back
from surgery.splicer.record import look_up

T = TypeVar("T")
_CONTAINERS = (dict, OrderedDict, list, set)


def atomically(model: nn.Module, operate: Callable[[Before], T]) -> T:
    """Return ``operate(before)``. If it raises, at whatever line, the model is put back first.

    Args:
        operate: changes the model; it calls ``before.note`` with tensors before it overwrites them.
    """

    def attempt() -> T:
        before = Before(model)
        try:
            return operate(before)
        except BaseException:
            before.put_back()
            raise

    return exclusively(attempt)


class Before:
    """A model as it is now, to be put back.

    Attributes:
        classes: objects and their classes.
        contents: containers, each with a copy.
        states: the states of the hosts.
        tensors: tensors whose values change, the rows, and their values; see :meth:`note`.
        trained: parameters, and whether they require a gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        self.classes: list[tuple[Any, type]] = []
        self.contents: list[tuple[Any, Any]] = []
        self.states: list[HostState] = []
        self.tensors: list[tuple[Tensor, Any, Tensor]] = []
        for module in model.modules():
            self._keep(module)
            state = state_of(module)
            if state is not None:
                self.states.append(state)
                self._keep(state)
                for operation in state.operations.values():
                    self._keep(operation)
        self._keep(look_up(model))
        self._keep(look_up(model).switches)
        quantizer = getattr(model, "hf_quantizer", None)
        if quantizer is not None:
            self.classes.append((quantizer, type(quantizer)))
        self.trained = [(p, p.requires_grad, _copy(p._backward_hooks)) for p in model.parameters()]

    def _keep(self, thing: Any) -> None:
        """Keep the class and the attributes of an object, and the items of its containers."""
        self.classes.append((thing, type(thing)))
        self.contents.append((vars(thing), dict(vars(thing))))
        self.contents += [
            (value, value.copy()) for value in vars(thing).values() if type(value) in _CONTAINERS
        ]

    def note(self, tensors: Iterable[Tensor], rows: Any = ...) -> None:
        """Keep the values of tensors, or of these rows of theirs, that are to be overwritten."""
        self.tensors += [(tensor, rows, tensor.detach()[rows].clone()) for tensor in tensors]

    def put_back(self) -> None:
        """Put everything back; begin again after an interrupt."""
        try:
            self._put_back()
        except BaseException:
            self._put_back()
            raise

    def _put_back(self) -> None:
        for thing, kind in self.classes:
            if type(thing) is not kind:
                object.__setattr__(thing, "__class__", kind)
        for container, copy in self.contents:
            put_items_back(container, copy)
        for state in self.states:
            if any(selection.retired for selection in state.every_selection()):
                state.refresh()
        for parameter, trained, hooks in self.trained:
            if parameter.requires_grad != trained:
                parameter.requires_grad_(trained)
            if parameter._backward_hooks is not None:
                put_items_back(parameter._backward_hooks, hooks)
        with torch.no_grad():
            for tensor, rows, values in self.tensors:
                tensor[rows] = values


def _copy(hooks: Any) -> dict[Any, Any]:
    return {} if hooks is None else dict(hooks)
