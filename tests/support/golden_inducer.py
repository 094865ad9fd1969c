"""The golden case of inducer-tuning: parameters and heads that one sine fills."""

from __future__ import annotations

import torch

from surgery_plugins.inducer import Inducer
from tests.support.heads_by_hand import fill

Q, K, V = (fill((1, 2, 3, 4), a) for a in (0.1, 0.2, 0.3))


def golden(key_rank: int = 2) -> Inducer:
    inducer = Inducer(2, 4, 6, key_rank, 3, scale=0.5).double()
    starts = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)[0 if key_rank else 4 :]
    with torch.no_grad():
        for parameter, a in zip(inducer.parameters(), starts, strict=True):
            parameter.copy_(fill(tuple(parameter.shape), a))
    return inducer
