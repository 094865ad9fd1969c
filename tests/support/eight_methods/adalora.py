"""AdaLoRA: SVD-like updates, pruned to a budget.   y = x W + b + x Q diag(l) P^T     l starts at 0

Zhang et al. 2023, arXiv:2303.10512, eqs. 3-12, smoothed by triplet; Q (d_in, r), P (d_out, r).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import surgery


class Svd(nn.Module):
    def __init__(self, d_in: int, d_out: int, rank: int) -> None:
        super().__init__()
        self.register_buffer("steps", torch.ones(()))
        self.register_buffer("felt", torch.zeros(2, rank))
        self.q, self.p = (nn.Parameter(torch.randn(n, rank) / 50) for n in (d_in, d_out))
        self.l = nn.Parameter(torch.zeros(1, rank))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.q * self.l) @ self.p.T

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self(torch.eye(len(self.q)).to(self.q)).to(weight), bias

    def importance(self) -> Tensor:
        now = sum((w.detach() * w.grad).abs().mean(0) for w in (self.q, self.l, self.p))
        mean = self.felt[0].lerp_(now, 0.15)
        return mean * self.felt[1].lerp_((now - mean).abs(), 0.15)


@dataclass(frozen=True)
class AdaLora(surgery.Method):
    """Update queries and values; all share ``target`` ranks a module. Start: exact. Mergeable."""

    name = "adalora"
    rank: int = 6
    target: int = 2

    def splice(self, site: surgery.OpenSite) -> None:
        for port in site.select(("query", "value")):
            port.add(Svd(port.in_width or 0, port.width, self.rank), name=self.name)

    def on_train_start(self, model: nn.Module, total_steps: int) -> None:
        self.inserted[0].steps.fill_(total_steps)

    def extra_loss(self) -> Tensor:
        grams = [w.T @ w for module in self.inserted for w in (module.q, module.p)]
        return 0.1 * sum((gram - torch.eye(self.rank).to(gram)).square().sum() for gram in grams)

    def on_step(self, step: int) -> None:
        left = min(1, max(0, 0.7 - step / self.inserted[0].steps.item()) / 0.6) ** 3
        scores = torch.stack([module.importance() for module in self.inserted])
        kept = round(len(scores) * (self.target + (self.rank - self.target) * left))
        for m, lost in zip(self.inserted, scores < scores.flatten().topk(kept)[0][-1], strict=True):
            m.l.data.masked_fill_(lost, 0)


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    register(AdaLora)
