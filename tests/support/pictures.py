"""Tiny models with a convolution of every kind, each with an input."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Pictures(nn.Module):
    """Convolutions of every kind, in front of a head."""

    def __init__(self, first: nn.Module, channels: int = 6) -> None:
        super().__init__()
        self.first, self.head = first, nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.first(x)).flatten(2).mean(-1))
        return y


CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "2d": (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 7)),
    "3d": (nn.Conv3d(2, 6, 2), (2, 2, 4, 4, 4)),
    "patches": (nn.Conv2d(3, 6, 4, stride=4), (2, 3, 8, 8)),
    "dilated, reflecting": (
        nn.Conv2d(4, 6, 3, padding=2, dilation=2, padding_mode="reflect"), (2, 4, 7, 7)),
    "same": (nn.Conv1d(4, 6, 5, padding="same", bias=False), (2, 4, 9)),
    "one axis": (nn.Conv2d(4, 6, (1, 5), padding=(0, 2)), (2, 4, 3, 9)),
    "groups": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 5)),
    "depthwise": (nn.Conv1d(6, 6, 4, padding=3, groups=6), (2, 6, 9)),
}  # fmt: skip


def pictures(kind: str) -> tuple[Pictures, Tensor]:
    convolution, shape = CONVOLUTIONS[kind]
    torch.manual_seed(0)
    return Pictures(copy.deepcopy(convolution)).eval(), torch.randn(shape)
