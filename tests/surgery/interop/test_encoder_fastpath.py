"""torch's own attention modules, whose fused inference path would bypass what is spliced in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery

LORA = surgery.method("lora", rank=2, ports=("query", "key", "value", "output"))
INDUCER = surgery.method("inducer", key_rank=2, value_rank=2)


def encoder(batch_first: bool = True, norm_first: bool = False) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        32, 4, 64, 0.0, batch_first=batch_first, norm_first=norm_first
    )
    nested = batch_first and not norm_first
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for _, parameter in surgery.spliced_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.3)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoder_is_alive_in_every_mode(batch_first: bool, norm_first: bool) -> None:
    model = encoder(batch_first, norm_first)
    x = torch.randn(2, 7, 32) if batch_first else torch.randn(7, 2, 32)
    with torch.no_grad():
        base = model(x)
    sites = surgery.locate(model, x).expect(4)
    assert [s.kind for s in sites] == ["attention", "ffn"] * 2
    surgery.splice(model, [LORA, INDUCER], at=sites.attention)
    surgery.splice(model, surgery.method("lora", ports=("up", "output")), at=sites.ffn, name="ffn")
    with torch.no_grad():
        assert torch.allclose(model(x), base, atol=1e-5)  # the fused path rounds differently
    move(model)
    with_gradients = model(x)
    assert not torch.allclose(with_gradients, base, atol=1e-2)
    with torch.no_grad():
        assert torch.equal(model(x), with_gradients)
        assert torch.allclose(model.train()(x), with_gradients, atol=1e-5)
        model.eval()
    surgery.remove(model)
    with torch.no_grad():
        assert torch.equal(model(x), base)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_padding_reaches_a_spliced_encoder_as_a_mask() -> None:
    model, x = encoder(), torch.randn(2, 7, 32)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, 5:] = True
    surgery.splice(model, [LORA, INDUCER], example_inputs=x)
    move(model)
    with torch.no_grad():
        whole = model(x, src_key_padding_mask=padding)
        alone = model(x[:1, :5])
    assert torch.allclose(whole[0, :5], alone[0], atol=1e-5)
    surgery.remove(model)
    assert model.use_nested_tensor


class Pooled(nn.Module):
    """Attention from a learned query, as pooling heads do it; weights are asked for or not."""

    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.weights, self.probe = weights, nn.Parameter(torch.randn(1, 1, 32))
        self.mix = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        query = self.probe.repeat(len(x), 1, 1)
        return self.mix(query, x, x, need_weights=self.weights)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("weights", [True, False])
def test_attention_from_a_learned_query(weights: bool) -> None:
    torch.manual_seed(0)
    model, x = Pooled(weights).eval(), torch.randn(2, 7, 32)
    base = model(x)
    site = surgery.locate(model, x).expect(1)[0]
    assert site.cross
    surgery.splice(model, [LORA, INDUCER], at=site)
    assert torch.equal(model(x), base)
    move(model)
    assert not torch.equal(model(x), base)


def test_the_lora_of_a_fused_encoder_trains_and_stays_in_evaluation() -> None:
    """A peer's LoRA trains here to a loss of 0.01, and then evaluates exactly like the base."""
    torch.manual_seed(0)
    model, head = encoder(), nn.Linear(32, 2)
    x, y = torch.randn(16, 7, 32), torch.arange(16) % 2
    surgery.splice(model, LORA, example_inputs=x)
    surgery.freeze_base(model)
    optimizer = torch.optim.Adam([*(p for p in model.parameters() if p.requires_grad)], lr=0.01)

    def loss() -> Any:
        return nn.functional.cross_entropy(head(model(x).mean(1)), y)

    model.train()
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    trained = loss().item()
    model.eval()
    with torch.no_grad():
        assert abs(loss().item() - trained) < 0.05
        with surgery.disabled(model):
            assert loss().item() > trained + 0.2
