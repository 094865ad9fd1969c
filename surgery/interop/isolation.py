"""Quiet: run parts of a model without a trace: no hook, no random number, no training flag."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from surgery.interop import encoder_fastpath
from surgery.interop.patching import patched


class _Thread(threading.local):
    capturing = False


_current = _Thread()


@contextmanager
def capture_running() -> Iterator[None]:
    """Mark this thread as capturing."""
    previous, _current.capturing = capturing(), True
    try:
        yield
    finally:
        _current.capturing = previous


def capturing() -> bool:
    """Is this thread capturing? Then hosts inside what is kept whole run their own forward."""
    return _current.capturing


@contextmanager
def silenced(module: nn.Module) -> Iterator[None]:
    """Run modules as they were before any splice, for their values only (see ``hookless``)."""
    with capture_running(), hookless(module):
        yield


@contextmanager
def hookless(module: nn.Module) -> Iterator[None]:
    """Run forwards unseen: no hook fires, no random state moves."""

    def bare(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda mod, *args, **kwargs: mod.forward(*args, **kwargs)

    replacements = [(nn.Module, "__call__", bare), *encoder_fastpath.OPEN]
    with untouched(module), patched(*replacements):
        yield


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Leave random states and the module's buffers as they were, and let no mode look on."""
    with _unwatched(), quiet_random(module):
        with real_tensors(), torch.no_grad():
            kept = [(b, b.clone()) for b in module.buffers() if not b.is_meta]
        try:
            yield
        finally:
            with real_tensors(), torch.no_grad():
                for buffer, before in kept:  # running statistics, counters
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)


def _unwatched() -> Any:
    """Keep what runs from the user's modes (selective checkpointing, counters of operations)."""
    modes = _get_current_dispatch_mode_stack()
    own = any(mode.is_infra_mode() for mode in modes)  # torch.export looks on: it is to see it all
    return nullcontext() if own or not modes else real_tensors()


@contextmanager
def quiet_random(module: nn.Module) -> Iterator[None]:
    """Leave the random state of Python, the CPU and the devices of ``module`` as it was."""
    devices = {p.device for p in module.parameters() if p.device.type not in ("cpu", "meta")}
    state = random.getstate()
    kinds = {d.type for d in devices}
    try:
        kind = kinds.pop() if kinds else "cuda"
        with torch.random.fork_rng(sorted({d.index or 0 for d in devices}), device_type=kind):
            yield
    finally:
        random.setstate(state)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without calling anybody's ``train`` method; the flags come back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def real_tensors() -> Any:
    """Tensors that are made inside are real ones, also while torch.export looks on."""
    return _disable_current_modes()
