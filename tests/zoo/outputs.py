"""Run a tiny model, and compare what two runs give."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.build import tensors


def outputs(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        output = model(**copy.deepcopy(inputs))
    return [t.clone() for t in tensors(output)]


def differ(a: list[Tensor], b: list[Tensor]) -> str:
    """How two lists of tensors differ; the empty string if every bit is equal."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return f"shapes differ: {len(a)} and {len(b)} tensors"
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if not torch.equal(x, y) and not bool(((x == y) | ((x != x) & (y != y))).all()):
            gap = (x.double() - y.double()).abs().nan_to_num(nan=float("inf")).max().item()
            return f"tensor {i} of {len(a)} differs by {gap:.2g}"
    return ""
