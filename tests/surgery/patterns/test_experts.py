"""A loop over experts in a list is one FFN site, and each expert's projections are linear sites."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from tests.support.experts import (
    EXPERTS,
    MIXTURES,
    Block,
    D,
    Decoder,
    DeepSeek,
    Gated,
    Inline,
    Mixtral,
    Mixture,
    Residual,
    TopKLoop,
    Where,
    plain,
)
from tests.support.models import perturb

EXAMPLE = torch.tensor([[1, 2, 3]])
BATCHES = [
    EXAMPLE,
    torch.tensor([[7]]),
    torch.arange(20).view(2, 10),
    torch.tensor([[4, 4], [9, 0]]),
]
LORA = surgery.method("lora", rank=2, ports="output")
ADAPTER = surgery.method("ffn_adapter", rank=2)


def decoder(mixture: type[Mixture], expert: Callable[[], nn.Module] = Gated) -> Decoder:
    """A decoder in which no token chooses expert 0 of the first block in the example."""
    torch.manual_seed(0)
    model = Decoder(lambda: mixture(expert)).double().eval()
    block: Any = model.blocks[0]
    with torch.no_grad():
        block.second.bias += 1  # all tokens point one way, and expert 0 the other
        block.mixture.router.weight[0] = -9
    return model


def inline(block: Any) -> Inline:
    """The block with the loop in its own forward."""
    made = Inline(block.mixture).double()
    made.load_state_dict(block.state_dict(), strict=False)
    return made


def of_experts(sites: surgery.Sites) -> list[surgery.Site]:
    return [site for site in sites.linear if ".experts" in site.path]


def in_experts(model: nn.Module) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".experts" in name
    }


def calls_of(model: Decoder, ids: Tensor) -> list[int]:
    """How many rows each expert of the first block is given."""
    rows = [0] * EXPERTS
    experts: Any = model.blocks[0].mixture.experts  # type: ignore[union-attr]
    experts = experts.values() if isinstance(experts, nn.ModuleDict) else experts

    def count(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Tensor]) -> None:
            rows[number] += given[0].flatten(0, -2).shape[0]

        return hook

    handles = [e.register_forward_pre_hook(count(i)) for i, e in enumerate(experts)]
    model(ids)
    for handle in handles:
        handle.remove()
    return rows


@pytest.mark.parametrize("expert", [Gated, plain])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_loop_over_experts_is_one_site(
    mixture: type[Mixture], expert: Callable[[], nn.Module]
) -> None:
    model = decoder(mixture, expert)
    sites = surgery.locate(model, EXAMPLE)
    found = [site for site in sites.ffn if site.description == "expert FFN"]
    assert [site.path.partition(".mixture")[0] for site in found] == ["blocks.0", "blocks.1"]
    assert {tuple(site.ports) for site in found} == {("input", "output")}
    assert not [site for site in sites.ffn if ".experts" in site.path]
    assert {site.path for site in of_experts(sites)} == in_experts(model)
    assert not [line for line in sites.overlooked if "does not run" in line]
    assert [line for line in sites.overlooked if "mixture.experts" in line and "linear" in line]


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.few(4)
def test_an_adapter_beside_experts_is_right_for_other_routings(mixture: type[Mixture]) -> None:
    model = decoder(mixture)
    base = copy.deepcopy(model)
    sites = surgery.locate(model, EXAMPLE)
    at = [site for site in sites.ffn if site.description == "expert FFN"]
    surgery.splice(model, ADAPTER, at=surgery.Sites(at))
    for ids in BATCHES:
        assert torch.equal(model(ids), base(ids))
    perturb(model, 0.5)
    reference = copy.deepcopy(base)
    for block, own in zip(model.blocks, reference.blocks, strict=True):
        inside = next(m for m in block.modules() if hasattr(m, "ffn_adapter_output"))
        own.mixture = Beside(own.mixture, inside.ffn_adapter_output)  # type: ignore[arg-type]
    for ids in BATCHES:
        torch.testing.assert_close(model(ids), reference(ids))
        assert not torch.allclose(model(ids), base(ids))
    surgery.remove(model)
    assert all(torch.equal(model(ids), base(ids)) for ids in BATCHES)


class Beside(nn.Module):
    """A mixture and an adapter of the same input."""

    def __init__(self, mixture: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.mixture, self.adapter = mixture, adapter

    def forward(self, x: Tensor) -> Tensor:
        out = self.mixture(x)
        total: Tensor = (out[0] if isinstance(out, tuple) else out) + self.adapter(x)
        return total


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.few(6)
def test_updates_in_experts_equal_updated_weights(mixture: type[Mixture]) -> None:
    model = decoder(mixture)
    base = copy.deepcopy(model)
    sites = of_experts(surgery.locate(model, EXAMPLE))
    surgery.splice(model, LORA, at=surgery.Sites(sites))
    for ids in BATCHES:
        assert torch.equal(model(ids), base(ids))
    perturb(model, 0.3)
    reference = copy.deepcopy(base)
    for path in (site.path for site in sites):
        layer, update = reference.get_submodule(path), model.get_submodule(f"{path}.lora_output")
        layer.weight.data += update.scale * (update.a.T @ update.b).T
    for ids in BATCHES:
        torch.testing.assert_close(model(ids), reference(ids))
        assert not torch.allclose(model(ids), base(ids))
    ids = BATCHES[2]
    surgery.freeze_base(model)
    model.train()(ids).sum().backward()
    rows = calls_of(base, ids)
    weighs = [mixture is not Where or number > 0 for number in range(EXPERTS)]
    for number, given in enumerate(rows):
        of_this = re.compile(rf"blocks.0.mixture.experts\w*.(expert_)?{number}(\.|$)")
        for path in (site.path for site in sites if of_this.match(site.path)):
            gradient = model.get_submodule(f"{path}.lora_output").b.grad
            reached = gradient is not None and bool(gradient.any())
            assert reached == bool(given and weighs[number])
    surgery.merge(model.eval())
    torch.testing.assert_close(model(ids), reference(ids))


def test_no_token_of_the_example_goes_to_the_first_expert() -> None:
    model = decoder(TopKLoop)
    assert calls_of(model, EXAMPLE)[0] == 0


def test_a_mixture_in_the_block_itself_has_linear_sites() -> None:
    model = decoder(Mixtral)
    model.blocks = nn.ModuleList(map(inline, model.blocks)).eval()
    base = copy.deepcopy(model)
    sites = surgery.locate(model, EXAMPLE)
    assert not len(sites.ffn)
    assert {site.path for site in of_experts(sites)} == in_experts(model)
    surgery.splice(model, LORA, at=surgery.Sites([*sites.attention, *of_experts(sites)]))
    assert all(torch.equal(model(ids), base(ids)) for ids in BATCHES)
    perturb(model, 0.3)
    moved = [model(ids) for ids in BATCHES]
    surgery.merge(model)
    for ids, before in zip(BATCHES, moved, strict=True):
        torch.testing.assert_close(model(ids), before)
        assert not torch.allclose(before, base(ids))


def test_a_sub_layer_with_its_residual_is_no_site_and_says_so() -> None:
    torch.manual_seed(0)
    model = Decoder(Residual).eval()
    sites = surgery.locate(model, EXAMPLE)
    assert not len(sites.ffn)
    assert {site.path for site in of_experts(sites)} == in_experts(model)
    assert [line for line in sites.overlooked if "blocks.0.mixture.experts: 12 proj" in line]


@pytest.mark.parametrize("name", ["lora", "ia3", "bitfit", "ffn_adapter"])
def test_methods_start_exactly_and_go_without_a_trace(name: str) -> None:
    model = decoder(DeepSeek, plain)
    base, keys = copy.deepcopy(model), set(model.state_dict())
    report = surgery.splice(model, surgery.method(name), example_inputs=EXAMPLE)
    assert all(torch.equal(model(ids), base(ids)) for ids in BATCHES)
    assert ("ia3 at blocks.0" in report.left_out) == (name == "ia3")
    perturb(model, 0.5)
    moved = [model(ids) for ids in BATCHES]
    assert not any(torch.allclose(a, base(ids)) for a, ids in zip(moved, BATCHES, strict=True))
    assert {len(each) for each in surgery.variants(model).values()} == {1}
    surgery.remove(model)
    assert set(model.state_dict()) == keys
    assert all(torch.equal(model(ids), base(ids)) for ids in BATCHES)


class Branches(nn.Module):
    """Two networks in a list that are no experts of one mixture."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(2))
        self.ffns = nn.ModuleList(Gated() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "one after the other":
            for norm, ffn in zip(self.norms, self.ffns, strict=True):
                x = x + ffn(norm(x))
            return x
        first, second = (norm(x) for norm in self.norms)
        return x + self.ffns[0](first) + self.ffns[1](second)


@pytest.mark.parametrize("how", ["one after the other", "each from a norm of its own"])
def test_networks_that_read_each_other_or_other_tokens_are_sites_of_their_own(how: str) -> None:
    sites = surgery.locate(nn.Sequential(Branches(how)), torch.randn(2, 5, D))
    assert [site.path for site in sites.ffn] == ["0.ffns.0", "0.ffns.1"]
    assert all("activation" in site.ports for site in sites.ffn)


class Parallel(nn.Module):
    """An attention and an FFN side by side, in a list."""

    def __init__(self) -> None:
        super().__init__()
        block = Block(nn.Identity())
        self.parts = nn.ModuleList([block, Gated()])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + sum(part(x) for part in self.parts)
        return out


def test_an_attention_beside_an_ffn_is_no_expert() -> None:
    sites = surgery.locate(nn.Sequential(Parallel()), torch.randn(2, 5, D))
    assert [site.path for site in sites.ffn] == ["0.parts.1"]
    assert [site.path for site in sites.attention] == ["0.parts.0"]
