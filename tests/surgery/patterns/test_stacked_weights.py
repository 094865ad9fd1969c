"""How a module of experts uses its stacks is read from its products, not from names or shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery

E, D = 3, 8  # all matrices are square: only the products tell their sides

Run = Callable[[Any, Tensor, Tensor], Tensor]


class Experts(nn.Module):
    """Experts of three stacks, which ``run`` uses as it likes."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.p, self.q, self.r = (nn.Parameter(torch.randn(E, D, D) / 3) for _ in range(3))
        self.run = run

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        return self.run(self, x, chosen)


class Mixture(nn.Module):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(D, E), Experts(run)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        return self.experts(rows, self.router(rows).argmax(-1)).view_as(x)


class Model(nn.Module):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self.norm, self.mixture = nn.LayerNorm(D), Mixture(run)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.mixture(self.norm(x))
        return out


def gathered(m: Any, x: Tensor, chosen: Tensor) -> Tensor:
    x = x.unsqueeze(1)
    gate, up = torch.bmm(x, m.q[chosen]), torch.bmm(x, m.p[chosen])
    return torch.bmm(F.silu(gate) * up, m.r[chosen].mT).squeeze(1)


def in_front(m: Any, x: Tensor, chosen: Tensor) -> Tensor:
    x = x.unsqueeze(-1)
    hidden = F.silu(m.p[chosen] @ x) * (m.r.permute(0, 2, 1)[chosen] @ x)
    return (m.q[chosen] @ hidden).squeeze(-1)


def in_a_loop(m: Any, x: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(E):
        hidden = F.relu(F.linear(x, m.p[e])) @ m.r[e]
        out = torch.where((chosen == e).unsqueeze(-1), hidden, out)
    return out


CASES: list[tuple[Run, dict[str, tuple[str, bool]]]] = [
    (gathered, {"up": ("p", False), "gate": ("q", False), "output": ("r", True)}),
    (in_front, {"up": ("r", False), "gate": ("p", True), "output": ("q", True)}),
    (in_a_loop, {"up": ("p", True), "output": ("r", False)}),
]


@pytest.mark.parametrize(("run", "expected"), CASES)
def test_the_sides_of_square_matrices_are_told(run: Run, expected: Any) -> None:
    torch.manual_seed(0)
    model = Model(run).eval()
    (site,) = surgery.locate(model, torch.randn(2, 5, D)).experts
    found = {n: (p.weight.rpartition(".")[2], p.transposed) for n, p in site.ports.items()}
    assert found == expected


@pytest.mark.parametrize(("run", "expected"), CASES)
def test_lora_computes_and_folds_by_these_sides(run: Run, expected: Any) -> None:
    torch.manual_seed(0)
    model, x = Model(run).eval(), torch.randn(2, 5, D)
    base = model(x)
    method = surgery.method("lora", ports=("all",))
    surgery.splice(model, method, at=surgery.locate(model, x).experts)
    assert torch.equal(model(x), base)
    for _, parameter in surgery.spliced_parameters(model):
        nn.init.normal_(parameter, std=0.2)
    tuned = model(x)
    surgery.merge(model)
    torch.testing.assert_close(model(x), tuned, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tuned, base, atol=1e-3)


def test_stacks_of_another_kind_are_no_experts() -> None:
    """A mean of three products with one stack each is no FFN and no linear layer."""

    def run(m: Any, x: Tensor, chosen: Tensor) -> Tensor:
        x = x.unsqueeze(1)
        return sum((x @ w[chosen] for w in (m.p, m.q, m.r)), torch.zeros(())).squeeze(1)

    assert not len(surgery.locate(Model(run).eval(), torch.randn(2, 5, D)).experts)
