"""Draw dropout masks of inserted modules from a random stream of their own.

The base model's random draws stay as they were. So a zero-initialised adapter leaves the base
model's *training* outputs unchanged under the same seed.
"""

from __future__ import annotations

import itertools
import zlib
from collections import deque

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_salts = itertools.count(1)


class Dropout(nn.Module):
    """``x * mask / (1 - p)`` in training, ``x`` otherwise, without touching the global stream.

    A mask is seeded by the global random state, so a seeded run is reproducible; by the name of
    this dropout; and by the number of masks that it has drawn under that state. When gradient
    checkpointing runs a forward again in the backward pass, under the random state of the first
    run, the mask of the first run comes again.

    Args:
        p: probability of a zero, 0 <= p < 1.

    Shape: any -> the same
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.salt = next(_salts)
        self._drawn: deque[tuple[int, Tensor, int]] = deque(
            maxlen=256
        )  # (state, first inputs, seed)
        self._state, self._times = -1, 0  # the last state, and masks drawn under it

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0 or x.is_meta:
            return x
        if torch.compiler.is_compiling():
            return F.dropout(x, self.p)
        generator = torch.Generator(x.device)
        generator.manual_seed(self._seed(x))
        keep = torch.empty_like(x).bernoulli_(1 - self.p, generator=generator)
        return x * keep / (1 - self.p)

    def _seed(self, x: Tensor) -> int:
        """Return the seed of the next mask, or in a recomputed forward that of the first mask."""
        state, probe = _fingerprint(x.device), x.detach().flatten()[:16].clone()
        recomputing = torch._C._current_graph_task_id() != -1  # inside a backward pass
        if recomputing:
            same = [entry for entry in reversed(self._drawn) if entry[0] == state]
            same.sort(key=lambda entry: not torch.equal(entry[1], probe))  # the same input first
            if same:
                self._drawn = deque((e for e in self._drawn if e is not same[0]), maxlen=256)
                return same[0][2]
        self._times = self._times + 1 if state == self._state else 0
        self._state = state
        seed = zlib.crc32(f"{state} {self.salt} {self._times}".encode())
        self._drawn.append((state, probe, seed))
        return seed

    def extra_repr(self) -> str:
        return f"p={self.p}"


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
