"""Give TRL's preference trainers their reference: the model as it was given, with its adapter.

DPO, GRPO, RLOO and KTO compare the model that is trained with a frozen reference. A trainer that is
given none loads the base anew: a second base in memory, and another reference where training goes
on from an adapter. Here it gets what a function of the library makes of the given model.

Only the call of ``create_model_from_path`` inside ``__init__`` of a trainer that keeps a
``ref_model`` is answered, and only for a spliced model. TRL is not imported here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from torch import nn

from surgery.interop.imports import on_import

# Takes the given model, and whether the trainer will write to the reference; None leaves it to TRL.
MakeReference = Callable[[nn.Module, bool], nn.Module | None]

_MAKES = "create_model_from_path"
_given: ContextVar[tuple[nn.Module, bool] | None] = ContextVar("surgery_given", default=None)


def give_references(make: MakeReference) -> None:
    """Let ``make`` give TRL's trainers the reference of a model that they are given."""
    on_import("trl", functools.partial(_answer, make))


def _answer(make: MakeReference, module: ModuleType) -> None:
    """Wrap the trainers of one module of TRL, and the function by which they load a reference."""
    there = dict(vars(module))
    own = [each for each in there.values() if _keeps_reference(each, module.__name__)]
    if _MAKES in there and own:
        setattr(module, _MAKES, _asking(make, there[_MAKES]))
        for trainer in own:
            trainer.__init__ = _noting(trainer.__init__)


def _keeps_reference(value: Any, module: str) -> bool:
    """Whether this is a class of that module whose ``__init__`` sets ``self.ref_model``."""
    start = vars(value).get("__init__") if inspect.isclass(value) else None
    code = getattr(start, "__code__", None)
    return code is not None and value.__module__ == module and "ref_model" in code.co_names


def _noting(start: Callable[..., None]) -> Callable[..., None]:
    """Return ``__init__`` that notes the model it is given, for as long as it runs."""
    signature = inspect.signature(start)

    @functools.wraps(start)
    def init(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs).arguments
        model, writes = given.get("model"), getattr(given.get("args"), "sync_ref_model", False)
        token = _given.set((model, bool(writes)) if isinstance(model, nn.Module) else None)
        try:
            start(*args, **kwargs)
        finally:
            _given.reset(token)

    return init


def _asking(make: MakeReference, load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def create(*args: Any, **kwargs: Any) -> Any:
        given = _given.get()
        found = None if given is None else make(*given)
        return load(*args, **kwargs) if found is None else found

    return create
