"""What torch keeps for each thread is after an operation what it was before, whatever raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import BaseTorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import (
    BaseTorchDispatchMode,
    _get_current_dispatch_mode_stack,
    is_in_torch_dispatch_mode,
)

from surgery.interop import (
    LeftOnce,
    capture_running,
    capturing,
    keeping_thread_state,
    random_streams,
)

CONTEXTS: dict[str, Callable[[], Any]] = {
    "gradients off": torch.no_grad,
    "torch functions off": torch._C.DisableTorchFunction,
    "a function mode": BaseTorchFunctionMode,
    "own streams": random_streams._OwnGenerators,
    "a capture": capture_running,
}


def state() -> dict[str, Any]:
    return {
        "gradients": torch.is_grad_enabled(),
        "torch functions": torch._C._is_torch_function_enabled(),
        "function modes": _get_current_function_mode_stack(),  # type: ignore[no-untyped-call]
        "dispatch modes": _get_current_dispatch_mode_stack(),
        "capturing": capturing(),
        "a dispatch flag": is_in_torch_dispatch_mode(),
    }


@pytest.mark.parametrize("ends_by", ["a return", "an exception"])
@pytest.mark.parametrize("name", CONTEXTS)
def test_what_an_operation_leaves_on_is_put_back(name: str, ends_by: str) -> None:
    left_on = []

    @keeping_thread_state
    def operate() -> None:
        left_on.append(CONTEXTS[name]())  # entered and never left
        left_on[0].__enter__()
        assert state() != before
        if ends_by == "an exception":
            raise KeyboardInterrupt

    before = state()
    if ends_by == "an exception":
        with pytest.raises(KeyboardInterrupt):
            operate()
    else:
        operate()
    assert state() == before


def test_modes_that_an_operation_takes_off_are_back_in_their_order() -> None:
    @keeping_thread_state
    def operate() -> None:
        torch.overrides._pop_mode()
        torch.overrides._pop_mode()
        raise KeyboardInterrupt

    with BaseTorchFunctionMode(), BaseTorchFunctionMode():
        before = state()
        with pytest.raises(KeyboardInterrupt):
            operate()
        assert state() == before


def test_a_mode_that_ends_late_takes_no_other_off() -> None:
    """The rest of a generator runs when it is collected, after its mode was put back."""
    held: list[Any] = []

    def left_open() -> Any:
        with random_streams._OwnGenerators():
            yield

    @keeping_thread_state
    def operate() -> None:
        held.append(left_open())
        next(held[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        operate()
    with BaseTorchDispatchMode() as mode:
        held.pop().close()
        assert _get_current_dispatch_mode_stack() == [mode]


class Ending(LeftOnce, BaseTorchFunctionMode):
    """A mode whose end is interrupted ``times`` times before it does anything."""

    times = 2

    def __exit__(self, *error: Any) -> Any:
        self.times -= 1
        if self.times >= 0:
            raise KeyboardInterrupt
        return super().__exit__(*error)


def test_a_mode_whose_end_is_interrupted_is_ended() -> None:
    @keeping_thread_state
    def operate() -> None:
        with Ending():
            pass

    before = state()
    with pytest.raises(KeyboardInterrupt):
        operate()
    assert state() == before
