"""What is read of a tensor: its numbers, or only its shape, dtype and device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery

LIKE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "type_as": lambda x, v: x.type_as(v),
    "to": lambda x, v: x.to(v),
    "view_as": lambda x, v: x.view_as(v),
    "reshape_as": lambda x, v: x.reshape_as(v),
    "expand_as": lambda x, v: x.expand_as(v),
}


class Attention(nn.Module):
    def __init__(self, like: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.like = like

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (4, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = (self.like(h * 1.5, v) for h in (q, k))
        out: Tensor = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


@pytest.mark.parametrize("name", LIKE)
def test_a_tensor_that_gives_its_shape_or_dtype_gives_no_numbers(name: str) -> None:
    torch.manual_seed(0)
    model, plain = nn.Sequential(Attention(LIKE[name])), nn.Sequential(Attention(LIKE[name]))
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 5, 32)
    surgery.splice(model, surgery.method("lora", rank=2, ports=("query",)), example_inputs=x)
    lora = model[0].lora_query
    with torch.no_grad():
        lora.b.normal_()
        plain[0].q.weight += lora.scale * (lora.a.T @ lora.b).T
    torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_a_recurrent_layer_is_no_projection(kind: type[nn.RNNBase]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(10, 20), nn.Linear(20, 2)
            self.mixer = kind(20, 20, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.mixer(self.a(x).unsqueeze(1))[0].squeeze(1))
            return out

    model = Model()
    sites = surgery.locate(model, torch.randn(3, 10)).linear
    assert [site.path for site in sites] == ["a", "b"]
    surgery.splice(model, surgery.method("lora", ports=("output",)), at=sites)
