"""Run a model's forward without side effects and without being observed.

Each level does what the level below it does, and more:

    silenced        hosts run their own forward, as before any splice
      hookless      no hook fires; torch's fused encoder path is closed (encoder_fastpath.py)
        untouched   random states, buffers and attributes are restored at the end; modes that the
                    user has entered (selective checkpointing, counters of operations) see nothing

Beside these, ``evaluating`` sets evaluation mode, ``capture_running`` tells hosts to run their own
forward, and ``real_tensors`` keeps tensors that are made inside out of torch.export's trace.

Nothing here turns gradients off; callers that need none add ``torch.no_grad()``.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import (
    PreDispatchTorchFunctionMode,
    disable_proxy_modes_tracing,
)
from torch.overrides import _get_current_function_mode_stack, _pop_mode_temporarily
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from surgery.interop import encoder_fastpath
from surgery.interop.interrupts import deliver
from surgery.interop.packed_weights import unpacked
from surgery.interop.patching import OwnValue, patched
from surgery.interop.random_streams import random_state_kept
from surgery.interop.thread_state import keeping_thread_state, kept_for_threads

_OF_TORCH = frozenset(vars(nn.Module()))  # children, parameters, buffers, hooks


class _Thread(threading.local):
    capturing = False
    trying = False


_current = _Thread()
kept_for_threads(lambda: _current.capturing, lambda value: setattr(_current, "capturing", value))
kept_for_threads(lambda: _current.trying, lambda value: setattr(_current, "trying", value))


@contextmanager
def capture_running() -> Iterator[None]:
    """Mark this thread as capturing; see :func:`capturing`."""
    previous, _current.capturing = capturing(), True
    try:
        yield
    finally:
        _current.capturing = previous


def capturing() -> bool:
    """Whether this thread is inside :func:`capture_running`: hosts run their own forward then."""
    return _current.capturing


@contextmanager
def silenced(module: nn.Module) -> Iterator[None]:
    """Run ``module`` as it was before any splice, :func:`hookless`."""
    with capture_running(), hookless(module):
        yield


@contextmanager
def hookless(module: nn.Module) -> Iterator[None]:
    """Run forwards without their hooks, leaving everything :func:`untouched`."""

    def bare(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(mod: nn.Module, *args: Any, **kwargs: Any) -> Any:
            deliver()
            return mod.forward(*args, **kwargs)

        return call

    replacements = [(nn.Module, "__call__", bare), *encoder_fastpath.WITHOUT_FASTPATH]
    with untouched(module), patched(*replacements):
        yield


def on_trial() -> bool:
    """Whether this thread runs a model for the library: on an example, to be left untouched."""
    return _current.trying


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Restore random states, buffers and attributes at the end; hide the run from modes."""
    with unobserved(), untraced(), random_state_kept(module), attributes_kept(module):
        with real_tensors(), torch.no_grad():
            kept = [(t, t.clone()) for t in _state_tensors(module) if not t.is_meta]
        before_it, _current.trying = on_trial(), True
        try:
            yield
        finally:
            _current.trying = before_it
            with real_tensors(), torch.no_grad():
                for tensor, before in kept:  # such as running statistics
                    if not torch.equal(tensor, before):
                        tensor.copy_(before)


def _state_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the buffers of a module, and the tensors that it has as plain attributes."""
    yield from module.buffers()
    for each in module.modules():
        yield from (t for t in vars(each).values() if isinstance(t, torch.Tensor))


@contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Restore what modules keep as plain attributes, and the items of their lists and dicts.

    A forward may keep tensors or counts there. Objects of other types are not looked into.
    """
    kept: list[tuple[Any, Any]] = []
    for each in module.modules():
        kept.append((vars(each), dict(vars(each))))
        for name, value in vars(each).items():
            if type(value) in (list, dict, set) and name not in _OF_TORCH:
                kept.append((value, value.copy()))
    try:
        yield
    finally:
        for container, before in kept:
            put_items_back(container, before)


def put_items_back(container: Any, before: Any) -> None:
    """Give a list, dict or set the items of its copy; another thread sees no empty container."""
    if _same_items(container, before):
        return
    if type(container) is list:
        container[:] = before
        return
    for key in [key for key in container if key not in before]:
        container.discard(key) if type(container) is set else container.pop(key, None)
    if type(container) is not set and list(container) != list(before):
        for key in before:  # the order of the keys, too
            container[key] = container.pop(key, None)
    container.update(before)


def _same_items(now: Any, before: Any) -> bool:
    """Whether a container holds the very objects that its copy holds, in the same order."""
    if len(now) != len(before):
        return False
    if isinstance(now, dict) and not all(map(operator.is_, now.values(), before.values())):
        return False
    return all(map(operator.is_, now, before)) if type(now) is not set else now == before


@contextmanager
def untraced() -> Iterator[None]:
    """Keep ``torch.jit.trace`` from recording what runs inside; it turns sizes into tensors."""
    state = torch._C._get_tracing_state()
    if state is None:
        yield
        return
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


@contextmanager
def unobserved() -> Iterator[None]:
    """Disable the user's dispatch modes (selective checkpointing, counters of operations).

    If one of torch's own is active (torch.export, FakeTensorMode), those that compute stay, or
    their tensors and real ones would meet; those that only record are disabled.
    """
    modes = _get_current_dispatch_mode_stack()
    if not any(mode.is_infra_mode() for mode in modes):
        with real_tensors() if modes else nullcontext():
            yield
        return
    with ExitStack() as suspended:
        suspended.enter_context(disable_proxy_modes_tracing())
        suspended.enter_context(_switches_unrecorded())
        yield


@contextmanager
def _switches_unrecorded() -> Iterator[None]:
    """Suspend the function mode in which torch.export records where gradients go on and off."""
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    left = [mode for mode in modes if not isinstance(mode, PreDispatchTorchFunctionMode)]
    if len(left) == len(modes):
        yield
        return
    with ExitStack() as suspended:
        for _ in modes:
            suspended.enter_context(_pop_mode_temporarily())
        for mode in left:
            suspended.enter_context(mode)
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Let this thread, and no other, find every module of the model in evaluation mode."""
    modules = list(model.modules())
    scripted = [m for m in modules if isinstance(m, torch.jit.ScriptModule) and m.training]
    with patched((nn.Module, "training", OwnValue(modules, False)), *unpacked(modules)):
        try:
            for module in scripted:  # compiled code reads a flag of its own
                module.training = False
            yield
        finally:
            for module in scripted:
                module.training = True


def every_module(module: nn.Module) -> list[nn.Module]:
    """Return a module and all modules below it, also while another thread splices into them.

    Example:
        ``names = [type(m).__name__ for m in surgery.every_module(model)]``
    """
    while True:
        try:
            return list(module.modules())
        except RuntimeError as error:  # children came or went meanwhile
            if "changed size" not in str(error):
                raise


def base_children(module: nn.Module) -> dict[str, nn.Module]:
    """Return the children of a module without those that a splice has inserted into it."""
    inserted: set[str] = getattr(module, "_surgery_inserted", set)()
    children = module._modules.items()
    return {n: child for n, child in children if child is not None and n not in inserted}


def unspliced_forward(module: nn.Module) -> Callable[..., Any]:
    """Return the module's own forward, which on a host is not the spliced one."""
    unspliced: Callable[..., Any] | None = getattr(module, "_unspliced_forward", None)
    return module.forward if unspliced is None else unspliced


def outside_inference_mode(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function``, leaving ``torch.inference_mode`` while it runs.

    Parameters made in that mode could never be trained.
    """

    function = keeping_thread_state(function)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False):
            return function(*args, **kwargs)

    return run


@contextmanager
def differentiable(module: nn.Module) -> Iterator[None]:
    """Put copies in place of parameters and buffers that were made in inference mode.

    Autograd refuses such tensors; the copies let a trial differentiate all the same.
    """
    kept: list[tuple[dict[str, Any], str, Any]] = []
    for each in module.modules():
        for held in (each._parameters, each._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.is_inference():
                    kept.append((held, name, tensor))
    try:
        for held, name, tensor in kept:
            copy = tensor.clone()
            held[name] = nn.Parameter(copy, False) if isinstance(tensor, nn.Parameter) else copy
        yield
    finally:
        for held, name, tensor in kept:
            held[name] = tensor


@contextmanager
def real_tensors() -> Iterator[None]:
    """Disable all dispatch modes: tensors made inside are real, also under torch.export."""
    with _switches_unrecorded(), _disable_current_modes():
        yield
