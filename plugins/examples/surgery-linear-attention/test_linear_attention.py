import pytest
import surgery_linear_attention
import torch
from torch import nn

import surgery


class Attention(nn.Module):
    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p in (self.to_q, self.to_k, self.to_v)
        )
        y = torch.ops.surgery_example.linear_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


def model():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(Attention(), nn.LayerNorm(32)) for _ in range(2))).eval()


def test_its_attention_is_found_and_takes_lora():
    net, x = model(), torch.randn(2, 5, 32)
    before = net(x)
    sites = surgery.locate(net, x)
    assert [site.kind for site in sites] == ["attention"] * 2
    assert surgery_linear_attention.find_sites  # the hook that has found them
    assert {"query", "key", "value", "merged", "output"} <= set(sites[0].ports)
    surgery.splice(net, surgery.method("lora", rank=2), at=sites)
    assert torch.equal(net(x), before)
    surgery.freeze_base(net)
    net(x).square().mean().backward()
    moved = [p for _, p in surgery.spliced_parameters(net) if p.grad is not None and p.grad.any()]
    assert len(moved) == 4  # B of query and value, in both layers
    surgery.remove(net)
    assert torch.equal(net(x), before)


def test_virtual_tokens_need_a_logsumexp():
    net, x = model(), torch.randn(2, 5, 32)
    with pytest.raises(surgery.SurgeryError, match="find_sites"):
        surgery.splice(net, surgery.method("prefix", length=2), at=surgery.locate(net, x))
