"""An einsum with axes for heads takes scales and updates as the linear layers of its twin do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import surgery
from tests.support.models import perturb

D, H = 16, 2
METHODS = [("ssl",), ("ia3",), ("lora",), ("prefix",), ("ssb", "inducer"), ("ia3", "ssb")]


class Einsum(nn.Module):
    """Weights (D, H, d), or one (D, 3, H, d), and every product an einsum."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv = nn.ParameterList(
            [nn.Parameter(torch.randn(D, 3, H, D // H) / 4)]
            if fused
            else [nn.Parameter(torch.randn(D, H, D // H) / 4) for _ in range(3)]
        )
        self.out = nn.Parameter(torch.randn(H, D // H, D) / 4)

    def heads(self, x: Tensor) -> list[Tensor]:
        if len(self.qkv) == 1:
            return list(torch.einsum("bnd,dche->bnche", x, self.qkv[0]).unbind(2))
        return [torch.einsum("bnd,dhe->bnhe", x, w) for w in self.qkv]

    def last(self, y: Tensor) -> Tensor:
        return torch.einsum("bnhe,hed->bnd", y, self.out)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = (torch.einsum("bnhe,bmhe->bhnm", q, k) * (D // H) ** -0.5).softmax(-1)
        return x + self.last(torch.einsum("bhnm,bmhe->bnhe", weights, v))


class Linear(Einsum):
    """The same with linear layers."""

    def __init__(self, like: Einsum) -> None:
        super().__init__(len(like.qkv) == 1)
        self.maps = nn.ModuleList(linear(w.flatten(1)) for w in like.qkv)
        self.back = linear(like.out.flatten(0, 1))
        del self.qkv, self.out

    def heads(self, x: Tensor) -> list[Tensor]:
        if len(self.maps) == 1:
            return list(self.maps[0](x).unflatten(-1, (3, H, -1)).unbind(2))
        return [m(x).unflatten(-1, (H, -1)) for m in self.maps]

    def last(self, y: Tensor) -> Tensor:
        out: Tensor = self.back(y.flatten(2))
        return out


def linear(weight: Tensor) -> nn.Linear:
    """The layer ``x @ weight``."""
    layer = nn.Linear(*weight.shape, bias=False)
    layer.weight.data = weight.detach().T.contiguous()
    return layer


@pytest.mark.parametrize("fused", [False, True], ids=["each", "fused"])
@pytest.mark.parametrize("names", METHODS, ids="+".join)
def test_an_einsum_acts_as_its_twin(names: tuple[str, ...], fused: bool) -> None:
    torch.manual_seed(0)
    made = Einsum(fused).double()
    twin, x = Linear(made).double(), torch.randn(2, 5, D).double()
    models = [nn.Sequential(each) for each in (made, twin)]
    methods = [surgery.method(name) for name in names]
    base = models[0](x)
    for model in models:
        surgery.splice(model, methods, example_inputs=x)
    if names[0] != "prefix":
        assert torch.equal(models[0](x), base)
    perturb(models[1], 0.3)
    pairs = zip(*map(surgery.spliced_parameters, models), strict=True)
    with torch.no_grad():
        for (_, ours), (_, theirs) in pairs:
            ours.copy_(theirs)
    ours, theirs = (model(x) for model in models)
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, base)
    surgery.remove(models[0])
    assert torch.equal(models[0](x), base)
