"""What only looks like attention is not found; a model without any is refused, with what it has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

import surgery
from tests.support import models
from tests.zoo.build import build

D, H = 16, 2


class Around(nn.Module):
    """A block with one real attention, and ``distractor(self, x)`` added to the stream."""

    def __init__(self, distractor: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.distractor = distractor
        self.a, self.b, self.c, self.d = (nn.Linear(D, D) for _ in range(4))
        self.e, self.f, self.g = (nn.Linear(D, D) for _ in range(3))
        self.route, self.query = nn.Linear(D, 4), nn.Parameter(torch.randn(1, D))
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(4))
        self.kernel = nn.Linear(D, H * 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (H, -1)).transpose(1, 2) for m in (self.a, self.b, self.c))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.d(y)
        return x + self.distractor(self, x)


def router(m: Any, x: Tensor) -> Tensor:
    gates = m.route(x).softmax(-1)  # (B, n, experts)
    outputs = torch.stack([expert(x) for expert in m.experts], -2)
    return (gates.unsqueeze(-2) @ outputs).squeeze(-2)


def convolution(m: Any, x: Tensor) -> Tensor:
    kernel = m.kernel(x).reshape(-1, 3, 1).softmax(1)  # normalised over the kernel's width
    windows = F.pad(m.e(x), (0, 0, 1, 1)).unfold(1, 3, 1)  # (B, n, D, 3)
    return (windows.reshape(-1, D // H, 3) @ kernel).reshape(x.shape)


def over_features(m: Any, x: Tensor) -> Tensor:
    return m.e(x).softmax(-1) * m.f(x)


def between_channels(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.e(x), m.f(x), m.g(x)
    weights = (q.transpose(1, 2) @ k / x.shape[1]).softmax(-1)  # (B, D, D)
    return (weights @ v.transpose(1, 2)).transpose(1, 2)


def channels_by_sdpa(m: Any, x: Tensor) -> Tensor:
    q, k, v = (f(x).transpose(1, 2) for f in (m.e, m.f, m.g))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def over_queries(m: Any, x: Tensor) -> Tensor:
    weights = (m.e(x) @ m.f(x).transpose(1, 2)).softmax(1)
    return weights @ m.g(x)


def additive(m: Any, x: Tensor) -> Tensor:
    weights = m.route(x)[..., :1].softmax(1)  # one number for each token
    return (weights * m.e(x)).sum(1, keepdim=True) * m.f(x)


def mixed_layers(m: Any, x: Tensor) -> Tensor:
    layers = torch.stack([x, m.e(x), m.f(x)], -2)  # (B, n, 3, D)
    query = m.query.expand(*layers.shape[:-2], -1, -1)
    return F.scaled_dot_product_attention(query, layers, layers).squeeze(-2)


def indexer(m: Any, x: Tensor) -> Tensor:
    scores = F.relu(m.e(x) @ m.f(x).transpose(1, 2))  # which keys are looked at: no softmax
    chosen = scores.topk(2, -1).indices
    return m.g(x).mean(1, keepdim=True) + 0 * chosen.sum()


def of_the_output(m: Any, x: Tensor) -> Tensor:
    return m.e(x).log_softmax(-1).softmax(-1)


DISTRACTORS = [
    router, convolution, over_features, between_channels, channels_by_sdpa, over_queries, additive,
    mixed_layers, indexer, of_the_output,
]  # fmt: skip


@pytest.mark.parametrize("distractor", DISTRACTORS, ids=lambda f: f.__name__)
def test_only_the_attention_is_found(distractor: Callable[[Any, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Around(distractor), torch.randn(2, 5, D)
    site = surgery.locate(model, x).attention.expect(1)[0]
    assert site.heads == H
    base = model(x)
    surgery.splice(model, surgery.method("inducer", key_rank=2, value_rank=2), at=site)
    assert torch.equal(model(x), base)


REFUSED = {  # no attention over tokens: what is there instead
    "mamba": "linear",
    "falcon_mamba": "linear",
    "rwkv": "ffn",
    "convnext": "ffn",
    "resnet": "linear",
}


@pytest.mark.parametrize(("model_type", "there"), REFUSED.items())
def test_a_model_without_attention_says_what_there_is(model_type: str, there: str) -> None:
    tiny = build(model_type)
    before = dict(tiny.model.named_modules())
    message = "no attention site.*linear sites" if there == "linear" else "FFN.*no attention site"
    with pytest.raises(surgery.SiteError, match=message):
        surgery.splice(tiny.model, surgery.method("inducer"), example_inputs=tiny.inputs)
    assert dict(tiny.model.named_modules()) == before
    sites = getattr(surgery.locate(tiny.model, tiny.inputs), there)
    assert len(sites)
    lora = surgery.method("lora", ports=("output",) if there == "linear" else ("up", "output"))
    assert len(surgery.splice(tiny.model, lora, at=sites).sites) == len(sites)


def test_linear_sites_are_what_no_attention_and_no_ffn_has(tmp_path: Path) -> None:
    model, given = models.build("llama"), models.inputs("llama")
    sites = surgery.locate(model)
    assert [site.path for site in sites.linear] == ["lm_head"]
    surgery.splice(model, surgery.method("lora", ports="output"), at=sites.linear)
    models.perturb(model)
    head, update = model.lm_head, model.lm_head.lora_output
    assert type(head) is not nn.Linear
    x = torch.randn(2, 3, head.in_features)
    assert torch.allclose(head(x), x @ head.weight.mT + update(x), atol=1e-6)
    moved = models.logits(model, given)
    surgery.save(model, tmp_path)
    assert torch.equal(models.logits(surgery.load(models.build("llama"), tmp_path), given), moved)


class Flex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return self.out(flex_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_function_that_has_to_be_compiled_is_refused() -> None:
    with pytest.raises(surgery.SiteError, match="Choose another attention implementation"):
        surgery.locate(Flex().requires_grad_(False), torch.randn(2, 5, 32))
