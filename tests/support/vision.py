"""Attention as image models write it, each beside a twin in the plain layout with the same weights.

Channels     1x1 convolutions, (B, C, h, w)        twin: linear layers, (B, h w, C)
Windows      tokens cut into windows inside        twin: all tokens, other windows masked
Folded       windows, heads (B H, windows, n, d)   twin: that of Windows
Interleaved  windows, merged heads (B, n, d H)     twin: that of Windows, columns in that order
Pooled       the mean of two queries, added to     twin: adds them behind the output projection
             the context
Joint        text and image projected apart        no twin: tests compute it by hand
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, SIDE, WINDOW = 12, 3, 4, 2


class Channels(nn.Module):
    """Attention and FFN in convolutions of one position, and a depthwise one between."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Conv2d(WIDTH, 3 * WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)
        self.wide, self.narrow = nn.Conv2d(WIDTH, 20, 1), nn.Conv2d(20, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, h, w = x.shape
        q, k, v = self.qkv(x).view(B, 3, HEADS, C // HEADS, h * w).mT.unbind(1)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.mT.reshape(B, C, h, w))
        return x + self.narrow(F.gelu(self.wide(x)))


class Tokens(nn.Module):
    """The twin of :class:`Channels` and, with ``windows``, of :class:`Windows`."""

    def __init__(self, like: nn.Module | None = None, windows: bool = False) -> None:
        super().__init__()
        self.windows = windows
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)
        if like is not None:
            self.load_state_dict({n: p.flatten(1) if p.dim() > 2 else p
                                  for n, p in like.state_dict().items()})  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        B, n, C = x.shape
        q, k, v = self.qkv(x).view(B, n, 3, HEADS, C // HEADS).permute(2, 0, 3, 1, 4)
        mask = None
        if self.windows:
            places = torch.arange(n)
            window = (places // SIDE // WINDOW) * SIDE + places % SIDE // WINDOW
            mask = window[:, None] == window[None, :]
        y = F.scaled_dot_product_attention(q, k, v, mask)
        x = x + self.out(y.transpose(1, 2).reshape(B, n, C))
        return x + self.narrow(F.gelu(self.wide(x)))


class Windows(Tokens):
    """Attention in windows that the module cuts and joins itself: heads (B, windows, H, n, d)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Heads (B, windows, H, n, d) to merged heads (B, windows, n, H d)."""
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(3)

    def forward(self, x: Tensor) -> Tensor:
        B, n, C = x.shape
        across = SIDE // WINDOW
        cut = x.view(B, across, WINDOW, across, WINDOW, C).transpose(2, 3)
        qkv = self.qkv(cut.reshape(B, across**2, WINDOW**2, C))
        q, k, v = qkv.view(B, across**2, WINDOW**2, 3, HEADS, C // HEADS).permute(3, 0, 1, 4, 2, 5)
        y = self.attend(q, k, v)
        y = y.reshape(B, across, across, WINDOW, WINDOW, C).transpose(2, 3).reshape(B, n, C)
        x = x + self.out(y)
        return x + self.narrow(F.gelu(self.wide(x)))


class Folded(Windows):
    """Windows whose heads are part of the batch, as HaloNet has them."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, windows, _, n, d = q.shape
        q, k, v = (x.transpose(1, 2).reshape(B * HEADS, windows, n, d) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).view(B, HEADS, windows, n, d)
        return y.permute(0, 2, 3, 1, 4).flatten(3)


class Interleaved(Windows):
    """Windows whose merged heads have the head as the faster axis, as NesT has them."""

    def __init__(self) -> None:
        super().__init__()
        head_by_head = torch.arange(WIDTH).view(-1, HEADS).t().flatten()
        self.register_buffer("order", head_by_head, persistent=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v).permute(0, 1, 3, 4, 2).flatten(3)


class Pooled(Tokens):
    """Each query is the mean of two tokens', and is added to its context, as MViTv2 has it.

    ``behind``: the twin, which adds the queries behind the output projection.
    """

    def __init__(self, like: nn.Module | None = None, behind: bool = False) -> None:
        super().__init__(like)
        self.behind = behind

    def forward(self, x: Tensor) -> Tensor:
        B, n, C = x.shape
        q, k, v = self.qkv(x).view(B, n, 3, HEADS, C // HEADS).permute(2, 0, 3, 1, 4)
        q = q.unflatten(2, (-1, 2)).mean(3)
        y = F.scaled_dot_product_attention(q, k, v)
        if not self.behind:
            return self.out((y + q).transpose(1, 2).flatten(2))
        queries = F.linear(q.transpose(1, 2).flatten(2), self.out.weight)
        return self.out(y.transpose(1, 2).flatten(2)) + queries


class Joint(nn.Module):
    """One attention over text and image, each with projections of its own.

    ``rotate`` multiplies queries and keys by complex numbers behind the concatenation; ``last``
    computes no output of the text, as the last block of a model.
    """

    def __init__(self, rotate: bool = False, last: bool = False) -> None:
        super().__init__()
        self.rotate, self.last = rotate, last
        for stream in ("text", "image"):
            for port in ("query", "key", "value", "output"):
                if not (last and (stream, port) == ("text", "output")):
                    setattr(self, f"{stream}_{port}", nn.Linear(WIDTH, WIDTH))

    def heads(self, port: str, text: Tensor, image: Tensor) -> Tensor:
        parts = [getattr(self, f"text_{port}")(text), getattr(self, f"image_{port}")(image)]
        return torch.cat([x.unflatten(-1, (HEADS, -1)) for x in parts], 1)

    def turned(self, x: Tensor) -> Tensor:
        if not self.rotate:
            return x
        angle = torch.arange(x.shape[1])[:, None, None] * torch.tensor([1.0, 0.1])
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(3)

    def forward(self, text: Tensor, image: Tensor) -> Any:
        q, k, v = (self.heads(port, text, image) for port in ("query", "key", "value"))
        q, k = self.turned(q), self.turned(k)
        y = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        y = y.transpose(1, 2).flatten(2)
        for_text, for_image = y[:, : text.shape[1]], y[:, text.shape[1] :]
        if self.last:
            return self.image_output(for_image)
        return self.text_output(for_text), self.image_output(for_image)
