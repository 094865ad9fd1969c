"""Draw dropout masks of inserted modules from a random stream of their own.

The base model's random draws stay as they were, so a zero-initialised adapter leaves the base
model's *training* outputs unchanged under the same seed. A mask is keyed by

    the global random state    one seed is one run, and a resumed run goes on as the whole one would
    the name of the dropout    modules draw different masks
    how often it has drawn     in this forward, under this state: for modules that run repeatedly

A forward that draws nothing leaves the global state where it was, so the next one would draw the
same masks. Therefore the state is advanced by one draw at the end of each training forward
(:func:`advance`, a hook of the model). Gradient checkpointing restores the state of a forward that
it repeats, and so its masks.
"""

from __future__ import annotations

import itertools
import zlib
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.interop import checkpointed_region, every_module, in_backward

_salts = itertools.count(1)
_counting: WeakSet[Dropout] = WeakSet()  # those that have drawn masks in a forward that goes on


class Dropout(nn.Dropout):
    """``x * mask / (1 - p)`` in training, ``x`` otherwise, without touching the global stream.

    It is an ``nn.Dropout``: what sets ``p`` of all dropouts of a model reaches it, too. A mask is
    keyed as the top of this file says.

    Args:
        p: probability of a zero, 0 <= p < 1.

    Shape: any -> the same

    Example:
        ``dropout = surgery.Dropout(0.1)``, then ``dropout(x)`` in a module's forward
    """

    def __init__(self, p: float) -> None:
        super().__init__(p)
        self.salt = next(_salts)
        self._state, self._times = -1, 0  # the last state, and masks drawn under it

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0 or x.is_meta:
            return x
        if torch.compiler.is_compiling():
            return F.dropout(x, self.p)
        generator = torch.Generator(x.device)
        generator.manual_seed(self._seed(x.device))
        keep = torch.empty_like(x).bernoulli_(1 - self.p, generator=generator)
        return x * keep / (1 - self.p)

    def _seed(self, device: torch.device) -> int:
        """Return the seed of the next mask; in a repeated forward that of its first run."""
        state = _fingerprint(device)
        region = checkpointed_region()
        times = self._drawn_under(state) if region is None else self._in_region(region, state)
        return zlib.crc32(f"{state} {self.salt} {times}".encode())

    def _drawn_under(self, state: int) -> int:
        """Return how many masks were drawn under this state before, and count this one."""
        self._times = self._times + 1 if state == self._state else 0
        self._state = state
        _counting.add(self)
        return self._times

    def _in_region(self, region: dict[str, Any], state: int) -> int:
        """Return the count of this mask; a repetition counts as the first run did."""
        drawn: list[int] = region.setdefault(f"masks of {self.salt}", [])
        if not in_backward():
            drawn.append(self._drawn_under(state))
            return drawn[-1]
        repeated = region.setdefault(f"repeated masks of {self.salt}", itertools.count())
        return drawn[next(repeated) % len(drawn)] if drawn else 0

    def forget(self) -> None:
        """Begin to count anew: a forward has ended."""
        self._state = -1
        _counting.discard(self)


def advance(model: nn.Module, *_: Any) -> None:
    """End a training forward: count masks anew, and advance the global random state by one draw.

    A forward hook of a model with adapter dropout. Nothing is drawn where no mask was.
    """
    if torch.compiler.is_compiling() or not _counting or in_backward():
        return  # looking through all modules costs as much as some operators of a decoded token
    devices: dict[str, torch.device] = {}
    for module in every_module(model):
        if isinstance(module, Dropout) and module._state != -1:
            module.forget()
            parameter = next(model.parameters(), None)
            device = torch.device("cpu") if parameter is None else parameter.device
            devices[str(device)] = device
    for device in devices.values():
        torch.rand((), device=device)


def settle_advance(model: nn.Module) -> None:
    """Give ``model`` the hook :func:`advance` if it has adapter dropout; else take it away."""
    mine = [key for key, hook in model._forward_hooks.items() if hook is advance]
    needed = any(isinstance(module, Dropout) for module in model.modules())
    if needed and not mine:
        model.register_forward_hook(advance, always_call=True)
    for key in mine if not needed else ():
        del model._forward_hooks[key]
        model._forward_hooks_always_called.pop(key, None)


def draw_by_name(module: nn.Module, path: str) -> None:
    """Seed each dropout in ``module`` (at ``path``) by its name.

    The same model then draws the same masks, whatever this process has made before.
    """
    for name, inner in module.named_modules():
        if isinstance(inner, Dropout):
            inner.salt = zlib.crc32(f"{path}.{name}".encode())


def _fingerprint(device: torch.device) -> int:
    """Return a number that identifies the global random state, without drawing from it."""
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index or 0]
        return zlib.crc32(f"{generator.initial_seed()} {generator.get_offset()}".encode())
    return zlib.crc32(torch.random.get_rng_state().numpy().tobytes())
