"""The low-rank updates of LoRA where the map is no plain projection.

    rows of an embedding        y = E[i] + s A[i] B             E (V, D), A (V, r), B (r, D)
    convolution                 y = x * (W + s A B) + b         W (out, in / groups, h, w)
    stacked experts             y = x (W_e + s A_e B_e)         W (E, in, out), or (E, out, in)

Hu et al. 2021, arXiv:2106.09685, eq. 3, applied to the matrix that is stored: a kernel is one row
of in / groups h w numbers for each output. In a convolution with groups all of them share A, so the
sum has the shape of W and can be folded into it; ``LowRankAcrossGroups`` is the other choice.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LowRankRows(nn.Module):
    """Compute s A[i] B, which the splice adds to the rows of an embedding.

    Args:
        tokens, width: V and D of the table that it updates.
        rank: inner width r.
        scale: s.
        padding: the token whose row of A gets no gradient, as that of the table; None if none.

    Shape:
        ids (B, n) -> (B, n, D)
    Parameters:
        a (rank, V)  A transposed: zeros, so the spliced model starts equal to the base, and a
                     token that is never met keeps its row
        b (rank, D)  B: standard normal, both as in PEFT
    Cost: rank * (V + D) parameters.
    """

    def __init__(self, tokens: int, width: int, rank: int, scale: float, padding: int | None):
        super().__init__()
        self.scale, self.padding = scale, padding
        self.a = nn.Parameter(torch.zeros(rank, tokens))
        self.b = nn.Parameter(torch.randn(rank, width))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return ``E + s A B``, E (V, D)."""
        return weight + self.scale * (self.a.to(weight).T @ self.b.to(weight)), bias

    def forward(self, ids: Tensor) -> Tensor:
        hidden = F.embedding(ids, self.a.T, self.padding)  # (B, n, r)
        return (hidden * self.scale) @ self.b


class LowRankConvolution(nn.Module):
    """Compute s (drop(x) * (A B) + c), which the splice adds to the output of a convolution.

    Args:
        base: the convolution; its settings are read, its parameters are not.
        rank: inner width r.
        scale: s.
        dropout: probability, on the input of A.
        bias: whether to add c.

    Shape:
        x (B, in, h, w) -> (B, out, h', w'), or with one axis of positions, or three
    Parameters:
        a.weight (rank, in / groups, h, w)  A transposed: as a convolution of its own with the
                                            base's stride, padding and dilation; Kaiming-uniform
                                            with a = sqrt(5)
        b (rank, out)                       B: zeros, so the spliced model starts equal to the base
        bias (out,)                         c: zeros, if ``bias``
    Cost: rank * (in / groups h w + out) [+ out] parameters.
    """

    def __init__(self, base: Any, rank: int, scale: float, dropout: float, bias: bool) -> None:
        super().__init__()
        self.scale, self.groups = scale, base.groups
        self.dropout = surgery.Dropout(dropout)
        self.a = _like(base, base.in_channels // base.groups, rank)
        self.b = nn.Parameter(torch.zeros(rank, base.out_channels))
        self.bias = nn.Parameter(torch.zeros(base.out_channels)) if bias else None

    @property
    def needs_bias(self) -> bool:
        """Whether merging needs a bias on the convolution, to take up c."""
        return self.bias is not None

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return ``(W + s A B, b + s c)``, W (in / groups h w, out)."""
        if bias is not None and self.bias is not None:
            bias = bias + self.scale * self.bias.to(bias)
        a = self.a.weight.to(weight).flatten(1)
        return weight + self.scale * (a.T @ self.b.to(weight)), bias

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = self.dropout(x)
        each = x.reshape(-1, self.a.in_channels, *x.shape[2:])  # (B groups, in / groups, h, w)
        hidden = self.a(each)  # (B groups, r, h', w')
        hidden = hidden.reshape(len(x), -1, *hidden.shape[2:])  # (B, groups r, h', w')
        return _out(hidden * self.scale, self.b, self.groups, self.bias, self.scale)


class LowRankAcrossGroups(nn.Module):
    """Compute s (B (drop(x) * A) + c) for a convolution with groups, where A reads all channels.

    The update maps channels of one group to another, so it has no place in the convolution's own
    weight and cannot be folded into it. It is what PEFT makes of LoRA there.

    Args:
        base: the convolution; its settings are read, its parameters are not.
        rank: inner width r, which the groups divide.
        scale: s.
        dropout: probability, on the input of A.
        bias: whether to add c.

    Shape:
        x (B, in, h, w) -> (B, out, h', w'), or with one axis of positions, or three
    Parameters:
        a.weight (rank, in, h, w)   A transposed: Kaiming-uniform with a = sqrt(5)
        b (rank / groups, out)      B: zeros; group g of the outputs reads the g-th part of x * A
        bias (out,)                 c: zeros, if ``bias``
    Cost: rank * (in h w + out / groups) [+ out] parameters.
    """

    def __init__(self, base: Any, rank: int, scale: float, dropout: float, bias: bool) -> None:
        super().__init__()
        self.scale, self.groups = scale, base.groups
        self.dropout = surgery.Dropout(dropout)
        self.a = _like(base, base.in_channels, rank)
        self.b = nn.Parameter(torch.zeros(rank // base.groups, base.out_channels))
        self.bias = nn.Parameter(torch.zeros(base.out_channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(self.dropout(x) if self.training else x)  # (B, r, h', w')
        return _out(hidden * self.scale, self.b, self.groups, self.bias, self.scale)


def low_rank_convolution(base: Any, across_groups: bool, rank: int, *options: Any) -> nn.Module:
    """Return the update of a convolution.

    Raises:
        MethodError: it reads the channels of all groups, and they do not divide the rank.
    """
    if not across_groups or base.groups == 1:
        return LowRankConvolution(base, rank, *options)
    if rank % base.groups:
        raise surgery.MethodError(
            f"method 'lora': rank={rank} at a convolution with {base.groups} groups. With "
            "across_groups=True the groups must divide the rank; take a multiple of them."
        )
    return LowRankAcrossGroups(base, rank, *options)


def _like(base: Any, channels: int, rank: int) -> Any:
    """Return a convolution to r channels with the positions of another, Kaiming-uniform."""
    kind = next(each for each in _CONVOLUTIONS if isinstance(base, each))
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    a = kind(channels, rank, bias=False, **{name: getattr(base, name) for name in names})
    nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
    return a


def _out(hidden: Tensor, b: Tensor, groups: int, bias: Tensor | None, scale: float) -> Tensor:
    """Return ``B hidden + s c`` at each position, group by group."""
    ones = [1] * (hidden.dim() - 2)
    kernel = b.T.reshape(*b.T.shape, *ones)  # (out, r, 1, 1)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(ones) - 1]
    out = convolve(hidden, kernel, groups=groups)
    return out if bias is None else out + scale * bias.reshape(-1, *ones)


class LowRankExperts(nn.Module):
    """Let a module of experts run with W_e + s A_e B_e in place of W_e, for each expert e.

    The products with A_e and B_e are batched as the module batches those with W_e: in a loop over
    the experts that got a token, gathered for each token, or grouped.

    Args:
        weight: the stack W, as ``OpenPort.parameter`` gives it.
        transposed: whether each matrix of it is (out, in).
        experts, d_in, d_out: E, and the widths of one expert's map.
        rank: inner width r.
        scale: s.

    Shape:
        forward, its arguments -> what it returns
    Parameters:
        a (E, rank, in)   A transposed: Kaiming-uniform with a = sqrt(5), each expert by itself
        b (E, rank, out)  B: zeros, so the spliced model starts equal to the base
    Cost: E * rank * (in + out) parameters.
    """

    def __init__(
        self, weight: Any, transposed: bool, experts: int, d_in: int, d_out: int, rank: int,
        scale: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight, self.transposed, self.scale = weight, transposed, scale
        self.a = nn.Parameter(torch.empty(experts, rank, d_in))
        self.b = nn.Parameter(torch.zeros(experts, rank, d_out))
        for matrix in self.a:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return ``W + s A B``, W (E, in, out)."""
        return weight + self.scale * (self.a.to(weight).mT @ self.b.to(weight)), bias

    def forward(self, forward: Any, *given: Any, **named: Any) -> Any:
        left, right = self.a.mT, self.b * self.scale
        if self.transposed:
            left, right = right.mT, left.mT
        with self.weight.updated(left, right):
            return forward(*given, **named)
