"""Run a forward without moving the random streams that the process shares.

    one thread          the states are kept and set back
    several threads     setting back would repeat what the others have drawn since, so this thread
                        draws from streams of its own

A draw is an operation of torch that is tagged as random, on the CPU or a device, or a function of
Python's ``random``.
"""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from surgery.interop.patching import patched
from surgery.interop.thread_state import LeftOnce, kept_for_threads

_OF_PYTHON = [n for n in vars(random) if hasattr(random.Random, n) and not n.startswith("_")]


@contextmanager
def random_state_kept(module: nn.Module) -> Iterator[None]:
    """Leave the random streams of Python, the CPU and the devices of ``module`` as they are."""
    with _states_kept(module) if threading.active_count() == 1 else _own_streams():
        yield


@contextmanager
def _states_kept(module: nn.Module) -> Iterator[None]:
    """Restore the random states at the end."""
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
def _own_streams() -> Iterator[None]:
    """Draw from streams of this thread alone."""
    own = random.Random(0)

    def draw(name: str) -> Callable[..., Any]:
        return lambda original: getattr(own, name)

    outer = _thread.generators
    with patched(*((random, name, draw(name)) for name in _OF_PYTHON)):
        if _get_current_dispatch_mode_stack():  # our own, or torch.export's, which has no numbers
            yield
            return
        with _OwnGenerators() as _thread.generators:
            try:
                yield
            finally:
                _thread.generators = outer


def draw_anew() -> None:
    """Let what follows inside :func:`random_state_kept` draw the same numbers each time."""
    if _thread.generators is None:
        torch.manual_seed(0)
    else:
        _thread.generators.made.clear()


class _Thread(threading.local):
    generators: _OwnGenerators | None = None


_thread = _Thread()
kept_for_threads(lambda: _thread.generators, lambda value: setattr(_thread, "generators", value))


class _OwnGenerators(LeftOnce, TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Give random operations a generator of their own.

    One that takes no generator (dropout fused into another operation) draws from the shared stream.
    """

    supports_higher_order_operators = True  # such as flex_attention; they are passed on

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, tags = kwargs or {}, getattr(func, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags and kwargs.get("generator") is None:
            func = _with_generator(func)
            if _takes_generator(func):
                kwargs = {**kwargs, "generator": self.of(_device(args, kwargs))}
        return func(*args, **kwargs)

    def of(self, device: torch.device) -> torch.Generator:
        """Return this thread's generator of a device."""
        if device not in self.made:
            kind = device if device.type != "meta" else _CPU
            self.made[device] = torch.Generator(kind).manual_seed(0)
        return self.made[device]


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Return the device on which an operation draws."""
    given = kwargs.get("device")
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    return torch.device(given) if given is not None else tensors[0].device if tensors else _CPU


_CPU = torch.device("cpu")


def _takes_generator(func: Any) -> bool:
    return any(argument.name == "generator" for argument in func._schema.arguments)


@functools.cache
def _with_generator(func: Any) -> Any:
    """Return the overload of an operation that takes a generator, such as ``randn.generator``."""
    packet = func.overloadpacket
    name = "generator" if func._overloadname == "default" else f"{func._overloadname}_generator"
    return getattr(packet, name) if name in packet.overloads() else func
