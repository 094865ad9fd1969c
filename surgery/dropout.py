"""Dropout for inserted modules, drawn from a stream of its own.

The base model's random draws stay what they were, so a zero-initialised adapter leaves the base
model's *training* outputs unchanged under one seed.
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

    Each call's mask is seeded by the global random state (so ``torch.manual_seed`` reproduces it),
    by which dropout this is, and by how many masks it has drawn since that state last changed.
    When gradient checkpointing runs a forward a second time, in the backward pass and under the
    random state of the first time, the mask of the first time comes again.

    Args:
        p: probability of a zero, 0 <= p < 1.

    Shape: any -> the same
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.salt = next(_salts)
        self._drawn: deque[tuple[int, int]] = deque(maxlen=256)  # (state seen, seed drawn)
        self._times = 0  # masks drawn since the state last changed

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
        state = _fingerprint(device)
        recomputing = torch._C._current_graph_task_id() != -1  # inside a backward pass
        if recomputing:
            for entry in reversed(self._drawn):
                if entry[0] == state:
                    self._drawn.remove(entry)
                    return entry[1]
        unchanged = bool(self._drawn) and self._drawn[-1][0] == state
        self._times = self._times + 1 if unchanged else 0
        seed = zlib.crc32(f"{state} {self.salt} {self._times}".encode())
        self._drawn.append((state, seed))
        return seed

    def extra_repr(self) -> str:
        return f"p={self.p}"


def _fingerprint(device: torch.device) -> int:
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index or 0]
        return zlib.crc32(f"{generator.initial_seed()} {generator.get_offset()}".encode())
    return zlib.crc32(torch.random.get_rng_state().numpy().tobytes())
