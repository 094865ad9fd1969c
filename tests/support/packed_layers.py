"""Linear layers in four bits as GPTQ and AWQ store them: whole numbers in buffers, no ``weight``.

qweight (in / 8, out) int32     eight rows of four bits in each number
scales, zeros (in / group, out)
W = (q - zeros) scales          of the group of each row
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.models import build

GROUP = 8
Parts = tuple[Tensor, Tensor, Tensor]


def packed(weight: Tensor) -> Parts:
    """Pack a weight (out, in)."""
    groups = weight.detach().T.reshape(-1, GROUP, weight.shape[0])  # (groups, GROUP, out)
    low, high = groups.amin(1), groups.amax(1)
    scales = (high - low).clamp(min=1e-6) / 15
    zeros = (-low / scales).round()
    numbers = (groups / scales[:, None] + zeros[:, None]).round().clamp(0, 15)
    words = (
        numbers.reshape(-1, 8, weight.shape[0]).to(torch.int64) << torch.arange(0, 32, 4)[:, None]
    )
    return words.sum(1).to(torch.int32), scales, zeros


def unpacked(qweight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The matrix W (in, out)."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)[:, None]
    numbers = (qweight[:, None] >> shifts) & 15  # (in / 8, 8, out)
    groups = numbers.reshape(-1, GROUP, qweight.shape[1])
    return ((groups - zeros[:, None]) * scales[:, None]).flatten(0, 1)


@torch.library.custom_op("surgery_tests::packed_matmul", mutates_args=())
def packed_matmul(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return x @ unpacked(qweight, scales, zeros)


@packed_matmul.register_fake
def _(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return gradient @ unpacked(*ctx.saved_tensors).T, None, None, None


packed_matmul.register_autograd(_gradient, setup_context=_keep)


@torch.library.custom_op("surgery_tests::packed_matmul_without_gradient", mutates_args=())
def without_gradient(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return x @ unpacked(qweight, scales, zeros)


class Numbers(nn.Module):
    """The packed numbers; called, it gives the matrix W (in, out)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        for name, part in zip(("qweight", "scales", "zeros"), packed(linear.weight), strict=True):
            self.register_buffer(name, part)

    def parts(self) -> Parts:
        return self.qweight, self.scales, self.zeros

    def forward(self) -> Tensor:
        return unpacked(*self.parts())


class Packed(Numbers):
    """The layer in plain Python."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x @ unpacked(*self.parts())


class ByOperator(Packed):
    """The layer as one operator of its own, which has a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return packed_matmul(x, *self.parts())


class WithoutGradient(Packed):
    """The layer as an operator that knows no gradient, as those for inference."""

    def forward(self, x: Tensor) -> Tensor:
        return without_gradient(x, *self.parts())


class InAChild(nn.Module):
    """The numbers lie in a child; few tokens are computed otherwise than many, as by AWQ."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.store = Numbers(linear)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[:-1].numel() < 4:
            return x @ self.store()
        return packed_matmul(x, *self.store.parts())


class Unseen(nn.Module):
    """The numbers are attributes that torch does not know as buffers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.parts = packed(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return packed_matmul(x, *self.parts)


def with_packed_layers(kind: Callable[[nn.Linear], nn.Module]) -> Any:
    """A tiny Llama whose linear layers are packed, but for its head."""
    model = build("llama").eval()
    for module in list(model.model.layers.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear:
                setattr(module, name, kind(layer))
    return model
