"""Leave what torch and this library keep for each thread as it was, whatever line raises.

    gradients on or off, torch functions on or off, modes of torch    here
    whether a capture runs, streams of random numbers, ...            ``kept_for_threads``

The end of a ``with`` block does not run where an exception meets the very line that ends it, as one
of a signal may. A mode would then stay on in its thread for ever.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils import _python_dispatch as dispatch

P = ParamSpec("P")
T = TypeVar("T")

_parts: list[tuple[Callable[[], Any], Callable[[Any], object]]] = []


def kept_for_threads(read: Callable[[], Any], put_back: Callable[[Any], object]) -> None:
    """Add a part of a thread's state: how it is read, and how it is put back."""
    _parts.append((read, put_back))


def keeping_thread_state(function: Callable[P, T]) -> Callable[P, T]:
    """Return ``function``; however it ends, the thread's state is that of its beginning."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        state = [(put_back, read()) for read, put_back in _parts]
        try:
            try:
                return function(*args, **kwargs)
            finally:
                _put_back(state)
        finally:  # once more: an exception may have come in the lines above
            _put_back(state)

    return run


def _put_back(state: list[tuple[Callable[[Any], object], Any]]) -> None:
    for put_back, value in state:
        put_back(value)


def _torch_functions(state: Any) -> None:
    if torch._C._get_torch_function_state() != state:  # type: ignore[attr-defined]
        torch._C._set_torch_function_state(state)  # type: ignore[attr-defined]


def _function_stack() -> list[Any]:
    return _get_current_function_mode_stack()  # type: ignore[no-any-return, no-untyped-call]


def _dispatch_stack() -> list[Any]:
    return dispatch._get_current_dispatch_mode_stack()


def _function_modes(before: list[Any]) -> None:
    _same(_function_stack(), before, _pop_mode, _push_mode)


def _dispatch_modes(before: list[Any]) -> None:
    _same(_dispatch_stack(), before, dispatch._pop_mode, dispatch._push_mode)


def _same(now: list[Any], before: list[Any], pop: Any, push: Any) -> None:
    """Leave and push modes until the stack is the one before."""
    alike = 0
    while alike < min(len(now), len(before)) and now[alike] is before[alike]:
        alike += 1
    for mode in reversed(now[alike:]):
        leave = getattr(mode, "leave", None)  # of our own modes, see LeftOnce
        pop() if leave is None else leave()
    for mode in before[alike:]:
        push(mode)


class LeftOnce:
    """A mode of torch whose end may run once more, late, when it is on the stack no longer.

    A ``with`` block in a generator is left when the generator is collected, which may be long after
    an exception. By then the mode has been put back, and another may be the last one.
    """

    def __exit__(self, *error: Any) -> Any:
        # Asked of torch: a count of one's own is wrong where an exception comes beside it.
        if any(mode is self for mode in (*_function_stack(), *_dispatch_stack())):
            return super().__exit__(*error)  # type: ignore[misc]
        return None

    def leave(self) -> None:
        """End the mode, also what else its ``with`` block has changed."""
        self.__exit__(None, None, None)


kept_for_threads(torch._C._get_torch_function_state, _torch_functions)  # type: ignore[attr-defined]
kept_for_threads(_function_stack, _function_modes)
kept_for_threads(_dispatch_stack, _dispatch_modes)
kept_for_threads(torch.is_grad_enabled, torch._C._set_grad_enabled)
