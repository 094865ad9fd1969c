"""Every method under torch.func and torch.jit.trace."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import surgery
from surgery.testing import make_model
from tests.support.forwards import Attention, tokens
from tests.support.models import perturb


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["lora", "inducer", "prefix", "ntk_attention", "norga", "bitfit"])
def test_samples_are_differentiated_one_by_one_and_calls_are_traced(name: str) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(Attention()).eval()
    model: Any = copy.deepcopy(base)
    surgery.splice(model, surgery.method(name), example_inputs=tokens())
    perturb(model)
    model.requires_grad_(False)
    own = {n: p.detach() for n, p in surgery.spliced_parameters(model)}

    def loss(own: dict[str, Tensor], x: Tensor) -> Tensor:
        made: Tensor = functional_call(model, own, (x[None],)).square().mean()
        return made

    each = vmap(grad(loss), (None, 0))(own, tokens())
    for i, x in enumerate(tokens()):
        for _, p in surgery.spliced_parameters(model):
            p.requires_grad_(True)
        plain = torch.autograd.grad(
            model(x[None]).square().mean(), [p for _, p in surgery.spliced_parameters(model)]
        )
        for (n, _), expected in zip(surgery.spliced_parameters(model), plain, strict=True):
            torch.testing.assert_close(each[n][i], expected, rtol=1e-4, atol=1e-6)
    fresh = copy.deepcopy(model)  # which has no graph yet
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        traced = torch.jit.trace(fresh, tokens())
        assert torch.allclose(traced(tokens()), model(tokens()), atol=1e-6)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", ["lora", "inducer", "prefix", "prompt"])
@pytest.mark.few(3)
def test_a_decoder_is_traced_with_torchs_own_check(name: str, warm: bool) -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model: Any = make_model("grouped")

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.model(input_ids=ids, use_cache=False).logits
            return out

    whole, ids = Logits(), torch.arange(12).reshape(2, 6) + 3
    surgery.splice(whole.model, surgery.method(name))
    perturb(whole.model, 0.1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        if warm:
            whole(ids)
        traced = torch.jit.trace(whole, ids)
        torch.testing.assert_close(traced(ids), whole(ids), rtol=0, atol=1e-5)
        for _, parameter in surgery.spliced_parameters(whole):
            parameter.mul_(2)  # the program reads parameters, and holds nothing that they made
        torch.testing.assert_close(traced(ids), whole(ids), rtol=0, atol=1e-5)
