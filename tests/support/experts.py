"""Build models whose FFN is a mixture of experts in an ``nn.ModuleList``, as tutorials write it.

Each class of :data:`MIXTURES` maps x (B, n, D) -> (B, n, D) and differs in how tokens are routed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, EXPERTS = 16, 4


class Gated(nn.Module):
    """The expert of Mixtral and DeepSeek: silu(x G) * (x U), times W."""

    def __init__(self, width: int = 2 * D) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(D, width, bias=False), nn.Linear(D, width, bias=False)
        self.down = nn.Linear(width, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def plain(width: int = 2 * D) -> nn.Sequential:
    """Return the expert of most tutorials."""
    return nn.Sequential(nn.Linear(D, width), nn.GELU(), nn.Linear(width, D))


class Mixture(nn.Module):
    """A router and its experts."""

    top_k = 2

    def __init__(self, expert: Callable[[], nn.Module] = Gated) -> None:
        super().__init__()
        self.router = nn.Linear(D, EXPERTS, bias=False)
        self.experts = nn.ModuleList(expert() for _ in range(EXPERTS))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights and numbers of the chosen experts, (..., k) each."""
        weights, chosen = self.router(x).softmax(-1).topk(self.top_k, -1)
        return weights / weights.sum(-1, keepdim=True), chosen


class Mixtral(Mixture):
    """Older Mixtral: one-hot of the choice, ``torch.where``, ``index_add_``."""

    def forward(self, x: Tensor) -> Tensor:
        B, n, d = x.shape
        x = x.view(-1, d)
        weights, chosen = self.route(x)
        out = torch.zeros((B * n, d), dtype=x.dtype, device=x.device)
        mask = F.one_hot(chosen, num_classes=EXPERTS).permute(2, 1, 0)
        for number in range(EXPERTS):
            expert = self.experts[number]
            rank, rows = torch.where(mask[number])
            given = x[None, rows].reshape(-1, d)
            out.index_add_(0, rows, (expert(given) * weights[rows, rank, None]).to(x.dtype))
        return out.reshape(B, n, d)


class MixtralOfHits(Mixture):
    """Mixtral since 4.4x: only the experts that some token chose are visited."""

    def forward(self, x: Tensor) -> Tensor:
        B, n, d = x.shape
        x = x.view(-1, d)
        weights, chosen = self.route(x)
        out = torch.zeros_like(x)
        mask = F.one_hot(chosen, num_classes=EXPERTS).permute(2, 1, 0)
        for number in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            rank, rows = torch.where(mask[number].squeeze(0))
            given = self.experts[number](x[rows]) * weights[rows, rank, None]
            out.index_add_(0, rows, given)
        return out.reshape(B, n, d)


class DeepSeek(Mixture):
    """Counts decide which experts run; a shared expert sees every token."""

    def __init__(self, expert: Callable[[], nn.Module] = Gated) -> None:
        super().__init__(expert)
        self.shared = expert()

    def forward(self, x: Tensor) -> Tensor:
        shape, x = x.size(), x.view(-1, D)
        weights, chosen = self.route(x)
        y = torch.zeros_like(x)
        counts = torch.bincount(chosen.flatten(), minlength=EXPERTS).tolist()
        for i in range(EXPERTS):
            if counts[i] == 0:
                continue
            idx, top = torch.where(chosen == i)
            y[idx] += self.experts[i](x[idx]) * weights[idx, top, None]
        return (y + self.shared(x)).view(shape)


class Switch(Mixture):
    """Switch: one expert for each token, written into a clone of the input."""

    top_k = 1

    def forward(self, x: Tensor) -> Tensor:
        probabilities = self.router(x).softmax(-1)
        chosen = probabilities.argmax(-1)
        after = x.clone()
        for i, expert in enumerate(self.experts):
            mask = chosen == i
            after[mask] = expert(x[mask])
        return probabilities.max(-1, keepdim=True).values * after


class Nonzero(Mixture):
    """``nonzero`` and ``index_add_``, an expert without tokens is passed over."""

    top_k = 1

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, chosen = self.router(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            idx = (chosen == i).nonzero().squeeze(-1)
            if idx.numel() > 0:
                out.index_add_(0, idx, expert(flat[idx]) * weights[idx, None])
        return out.view_as(x)


class MaskedSum(Mixture):
    """``out[mask] += ...``, and a branch on ``mask.any()``."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            hit = chosen == i  # (B, n, k)
            mask = hit.any(-1)
            if mask.any():
                out[mask] += expert(x[mask]) * (weights * hit).sum(-1)[mask].unsqueeze(-1)
        return out


class TopKLoop(Mixture):
    """A loop over the k choices, around the loop over experts."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, chosen = self.route(flat)
        out = torch.zeros_like(flat)
        for k in range(self.top_k):
            for i, expert in enumerate(self.experts):
                mask = chosen[:, k] == i
                if not mask.any():
                    continue
                out[mask] += weights[mask, k : k + 1] * expert(flat[mask])
        return out.reshape(x.shape)


class Where(Mixture):
    """Each expert sees every token, and ``torch.where`` keeps what the router chose."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            share = (weights * (chosen == i)).sum(-1, keepdim=True)
            out = torch.where(share > 0, out + share * expert(x), out)
        return out


class Dense(Mixture):
    """A soft mixture: each expert sees every token, and the outputs are stacked."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = torch.stack([expert(x) for expert in self.experts], -2)  # (B, n, E, D)
        return (self.router(x).softmax(-1).unsqueeze(-1) * outputs).sum(-2)


class Unequal(MaskedSum):
    """Experts of several classes and widths, one of them the identity."""

    def __init__(self, expert: Callable[[], nn.Module] = Gated) -> None:
        super().__init__(expert)
        self.experts[1] = plain(3 * D)
        self.experts[2] = nn.Identity()
        self.experts[3] = Gated(D)


class TokenByToken(Mixture):
    """The loop of a beginner: token by token, choice by choice."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, chosen = self.route(flat)
        rows = []
        for t in range(flat.shape[0]):
            y = torch.zeros_like(flat[t : t + 1])
            for k in range(self.top_k):
                y = y + weights[t, k] * self.experts[int(chosen[t, k])](flat[t : t + 1])
            rows.append(y)
        return torch.cat(rows).view_as(x)


class WithLogits(Nonzero):
    """The router's logits are returned, too, for a loss that balances the experts."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.router(x)


class Named(Nonzero):
    """Experts by name."""

    def __init__(self, expert: Callable[[], nn.Module] = Gated) -> None:
        super().__init__(expert)
        self.experts = nn.ModuleDict({f"expert_{i}": e for i, e in enumerate(self.experts)})  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, chosen = self.router(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts.values()):  # type: ignore[operator]
            (idx,) = torch.where(chosen == i)
            out[idx] = expert(flat[idx]) * weights[idx, None]
        return out.view_as(x)


class Experts(nn.ModuleList):
    """A list that is called: it gives each token the weighted sum of its experts."""

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, expert in enumerate(self):
            rows, rank = torch.where(chosen == i)
            if len(rows):
                out.index_add_(0, rows, expert(x[rows]) * weights[rows, rank, None])
        return out


class Called(Mixture):
    """The loop is in the list's own forward."""

    def __init__(self, expert: Callable[[], nn.Module] = Gated) -> None:
        super().__init__(expert)
        self.experts = Experts(self.experts)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        out: Tensor = self.experts(flat, *self.route(flat))
        return out.view_as(x)


class Matrices(Mixture):
    """One list for each matrix of the experts."""

    def __init__(self, expert: Callable[[], nn.Module] = Gated) -> None:
        super().__init__(lambda: nn.Linear(D, 2 * D))
        self.experts_down = nn.ModuleList(nn.Linear(2 * D, D) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, chosen = self.route(flat)
        out = torch.zeros_like(flat)
        for i in range(EXPERTS):
            rows, rank = torch.where(chosen == i)
            if rows.numel() == 0:
                continue
            hidden = F.relu(self.experts[i](flat[rows]))
            out[rows] += self.experts_down[i](hidden) * weights[rows, rank, None]
        return out.view_as(x)


MIXTURES: list[type[Mixture]] = [
    Mixtral, MixtralOfHits, DeepSeek, Switch, Nonzero, MaskedSum, TopKLoop, Where, Dense, Unequal,
    TokenByToken, WithLogits, Named, Called, Matrices,
]  # fmt: skip


class Block(nn.Module):
    """Attention and a mixture, each added to the stream."""

    def __init__(self, mixture: nn.Module) -> None:
        super().__init__()
        self.norm, self.inward, self.outward = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.second, self.mixture = nn.LayerNorm(D), mixture

    def forward(self, x: Tensor) -> Tensor:
        heads = self.inward(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.outward(y.transpose(1, 2).flatten(2))
        out = self.mixture(self.second(x))
        total: Tensor = x + (out[0] if isinstance(out, tuple) else out)
        return total


class Inline(Block):
    """The loop is in the forward of the block, and no branch depends on the routing."""

    top_k, route = Mixture.top_k, Mixture.route

    def __init__(self, mixture: Any) -> None:
        super().__init__(nn.Identity())
        self.router, self.experts = mixture.router, mixture.experts

    def forward(self, x: Tensor) -> Tensor:
        heads = self.inward(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.outward(y.transpose(1, 2).flatten(2))
        return x + Mixtral.forward(self, self.second(x))  # type: ignore[arg-type]


class Residual(Nonzero):
    """A sub-layer: the norm and the residual are inside."""

    def __init__(self, expert: Callable[[], nn.Module] = Gated) -> None:
        super().__init__(expert)
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(self.norm(x))


class Decoder(nn.Module):
    """Two blocks, of which each has a mixture of its own."""

    def __init__(self, mixture: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, D)
        self.blocks = nn.ModuleList(Block(mixture()) for _ in range(2))
        self.head = nn.Linear(D, 20)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out
