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
        traced = torch.jit.trace(fresh, tokens(), check_trace=False)
        assert torch.allclose(traced(tokens()), model(tokens()), atol=1e-6)
