"""Call one model with other splices on: as the reference of preference training, say."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

from torch import nn

from surgery.host import subclass
from surgery.splicer.activation import Names, choice_of, require_spliced, using
from surgery.splicer.record import RECORD, spliced_model

_ATTRIBUTES = ("_modules", "_parameters", "_buffers")


def view(model: nn.Module, names: Names) -> nn.Module:
    """Return a module that is the model with these splices on, and shares everything with it.

    It has the class, the attributes, the weights and the modules of the model, and takes no memory
    of its own. ``names`` is as for :func:`surgery.use`. What is set on the view itself, such as a
    ``forward``, stays there. ``train`` and ``eval`` do nothing: the mode is that of the model.

    Raises:
        SpliceError: nothing is spliced in under a name.

    Example:
        ``surgery.copy(model, "policy", "reference")``, then
        ``DPOTrainer(model, ref_model=surgery.view(model, "reference"))``; the reference is the
        frozen copy, and the base is in memory once.
    """
    whole = spliced_model(model)
    require_spliced(whole)
    choice_of(whole, names)  # a wrong one raises here
    made: nn.Module = object.__new__(_view_class(type(whole)))  # type: ignore[arg-type]
    held = {key: value for key, value in vars(whole).items() if key != RECORD}
    held |= {key: dict(held[key]) for key in _ATTRIBUTES}
    vars(made).update(held, _surgery_view=(whole, names))
    return made


@functools.cache
def _view_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass whose calls have a choice of splices of their own."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        whole, names = vars(self)["_surgery_view"]
        with using(whole, names):
            return kind.__call__(self, *args, **kwargs)

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        return self

    original = vars(kind).get("_surgery_original", kind)  # of a host
    body = {"__call__": call, "train": train, "_surgery_original": original}
    return subclass(kind, {**_methods(kind), **body})


def _methods(kind: type[nn.Module]) -> dict[str, Any]:
    """Return the model's own public methods, each with the view's choice.

    They may call a part of the model past its ``__call__``, as ``generate`` calls an encoder.
    """
    found = {n: inspect.getattr_static(kind, n) for n in dir(kind) if not n.startswith("_")}
    return {
        name: _with_choice(function)
        for name, function in found.items()
        if isinstance(function, types.FunctionType)
        and vars(nn.Module).get(name) in (None, nn.Module.forward)
    }


def _with_choice(function: Any) -> Any:
    @functools.wraps(function)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with using(*vars(self)["_surgery_view"]):
            return function(self, *args, **kwargs)

    return method
