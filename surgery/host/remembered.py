"""Remember what a module has computed, for as long as it would compute the same again.

    get     the value, if nothing below the module has changed since ``set``
    set     keep a value, with what the module is now (:func:`_now`)
    forget  drop it

Noticed are other parameters, buffers and modules; writes that torch counts, as an optimizer's;
other storage, as ``parameter.data = x`` sets; attributes of modules that are numbers, texts, or
lists and dicts of these; hooks; which splices are on, and how far; the choice of an attention
function; and autocast. Nothing is remembered of a module in training, or of one whose weights
cannot be watched.

A write through ``parameter.data`` into the same storage moves no counter. It goes unnoticed here,
so an owner calls ``forget`` at each ``train()``.

Cost of ``get``: about a microsecond for each module and parameter.
"""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from surgery.host.state import STATE
from surgery.interop import huggingface
from surgery.rewrite import leading_epoch

Value = TypeVar("Value")

_SCALARS = frozenset((bool, int, float, str, type(None), torch.dtype))
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class Remembered(Generic[Value]):
    """A value that belongs to the present state of a module.

    Copies and pickles are empty. Threads may share one: each sees a whole value, or None.

    Example:
        >>> layer, held = torch.nn.Linear(1, 1).eval(), surgery.Remembered[float]()
        >>> held.set(layer, 0.5)
        >>> held.get(layer)
        0.5
        >>> held.get(layer.train()) is None
        True
    """

    def __init__(self) -> None:
        self._held: tuple[list[Any], list[Any], Value] | None = None

    def __reduce__(self) -> Any:
        return Remembered, ()

    def get(self, module: nn.Module) -> Value | None:
        """Return the value if the module is as it was when the value was set, else None."""
        if _becomes_a_program():
            return None
        held = self._held
        now = None if held is None else _now(module)
        if held is None or now is None:
            return None
        references, facts, value = held
        objects = now[0]
        if facts != now[1] or len(references) != len(objects):
            return None
        same = all(r() is x for r, x in zip(references, objects, strict=True))
        return value if same else None

    def set(self, module: nn.Module, value: Value) -> None:
        """Keep a value that the module has just computed, if the module can be watched."""
        if _becomes_a_program():
            return
        now = _now(module)
        self._held = None if now is None else ([weakref.ref(x) for x in now[0]], now[1], value)

    def forget(self) -> None:
        """Drop the value."""
        self._held = None


def _becomes_a_program() -> bool:
    """Whether this call is compiled, and would be guarded on what is held, or traced into it."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def _now(module: nn.Module) -> tuple[list[Any], list[Any]] | None:
    """Return the objects that a module computes with, and facts about them; None if not watchable.

    A storage is an object, too: its address may be another's once it is gone.
    """
    if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return None
    objects: list[Any] = []
    facts: list[Any] = [leading_epoch(), _autocast()]
    stack: list[Any] = [module]
    seen: set[nn.Module] = set()
    while stack:  # faster than ``modules()``, which makes a name for each
        part = stack.pop()
        if part is None or part in seen:
            continue
        seen.add(part)
        own = vars(part)
        stack += own["_modules"].values()
        if own["training"]:
            return None
        for hook in (*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values()):
            if not huggingface.is_own_hook(hook):
                return None
        objects.append(part)
        facts += (type(part), id(own.get("forward")))
        for tensor in (*own["_parameters"].values(), *own["_buffers"].values()):
            if tensor is None:
                continue
            kind = type(tensor)
            if (kind is not nn.Parameter and kind is not Tensor) or tensor.is_meta:
                return None
            if tensor.is_inference():
                return None
            objects += (tensor, tensor.untyped_storage())
            facts += (tensor._version, tensor.dtype)
        _add_plain(own, facts)
        state = own.get(STATE)
        if state is not None:
            facts += (id(state.selection()), state.switches.now())
    return objects, facts


def _autocast() -> list[Any]:
    kinds = ("cpu", "cuda")
    return [torch.is_autocast_enabled(k) and torch.get_autocast_dtype(k) for k in kinds]


def _add_plain(own: dict[str, Any], facts: list[Any]) -> None:
    """Add the attributes of a module that are numbers or texts, or lists and dicts of these.

    A config of transformers adds the choice of an attention function.
    """
    for name in own.keys() - _OF_EVERY_MODULE:
        x = own[name]
        kind = type(x)
        if kind in _SCALARS:
            facts += (name, x)
        elif kind is list or kind is tuple:
            facts += (name, [y for y in x if type(y) in _SCALARS])
        elif kind is dict:
            facts += (name, {k: y for k, y in x.items() if type(y) in _SCALARS})
        elif name == "config":
            facts.append(getattr(x, "_attn_implementation", None))
