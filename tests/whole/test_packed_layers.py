"""Layers that hold whole numbers in buffers, as GPTQ's and AWQ's: an adapter's life on them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.plugin.registry import registry
from tests.support.models import inputs, logits, perturb
from tests.support.packed_layers import (
    ByOperator,
    InAChild,
    Packed,
    Unseen,
    WithoutGradient,
    packed_matmul,
    with_packed_layers,
)

IDS = torch.arange(14).reshape(2, 7) + 3


class KeepsLayersWhole:
    """A plugin for :class:`InAChild`."""

    @surgery.hookimpl
    def is_leaf(self, module: nn.Module, path: str) -> bool | None:
        return True if isinstance(module, InAChild) else None


@pytest.fixture
def hook() -> Iterator[None]:
    """The plugin is installed while a test runs."""
    own = KeepsLayersWhole()
    registry().add(own, "keeps layers whole")
    yield
    registry().manager.unregister(own)


def lives(kind: type[nn.Module], folder: Path) -> None:
    """Splice, train, save, load, generate, merge, undo and remove."""
    model, case = with_packed_layers(kind), inputs("llama")
    base = logits(model, case)
    report = surgery.splice(model, surgery.method("lora", ports=("all",)))
    assert len(report.inserted) == 14
    assert torch.equal(logits(model, case), base)
    surgery.freeze_base(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(input_ids=IDS).logits.square().mean().backward()
    assert all(p.grad is not None for _, p in surgery.spliced_parameters(model))
    optimizer.step()
    perturb(model.eval(), 0.1)
    tuned = logits(model, case)
    surgery.save(model, folder)
    assert torch.equal(logits(surgery.load(with_packed_layers(kind), folder), case), tuned)
    assert model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] == 10
    with pytest.raises(surgery.SpliceError, match=r"'query' is not made by .*dequantize=True"):
        surgery.merge(model)
    assert torch.equal(logits(model, case), tuned)
    merged = surgery.merge(model, dequantize=True)
    assert len(merged.errors) == 14
    assert max(merged.errors.values()) < 1e-6
    torch.testing.assert_close(logits(model, case), tuned, rtol=1e-4, atol=1e-5)
    surgery.unmerge(model, merged)
    surgery.remove(model)
    assert torch.equal(logits(model, case), base)


@pytest.mark.parametrize("kind", [Packed, ByOperator])
def test_the_life_of_an_adapter_without_a_hook(kind: type[nn.Module], tmp_path: Path) -> None:
    lives(kind, tmp_path)


@pytest.mark.usefixtures("hook")
def test_the_life_of_an_adapter_on_layers_that_the_hook_keeps_whole(tmp_path: Path) -> None:
    lives(InAChild, tmp_path)


@pytest.mark.usefixtures("hook")
@pytest.mark.parametrize("name", ["inducer", "prefix", "ia3"])
def test_other_methods_on_layers_that_the_hook_keeps_whole(name: str) -> None:
    model, case = with_packed_layers(InAChild), inputs("llama")
    base = logits(model, case)
    surgery.splice(model, surgery.method(name))
    perturb(model)
    assert not torch.equal(logits(model, case), base)
    surgery.remove(model)
    assert torch.equal(logits(model, case), base)


@pytest.mark.parametrize("kind", [InAChild, Unseen])
def test_without_the_hook_the_error_says_what_to_do(kind: type[nn.Module]) -> None:
    model, case = with_packed_layers(kind), inputs("llama")
    base = logits(model, case)
    with pytest.raises(surgery.SiteError, match=r"parameters or buffers, and the is_leaf hook"):
        surgery.splice(model, surgery.method("lora"))
    assert torch.equal(logits(model, case), base)


def test_an_operator_without_a_gradient_is_named() -> None:
    model = with_packed_layers(WithoutGradient)
    with pytest.raises(surgery.SpliceError, match=r"packed_matmul_without_gradient.*autograd"):
        surgery.splice(model, surgery.method("lora", ports=("all",)))
    assert not surgery.summary(model).reports


def test_a_branch_in_a_layer_that_a_graph_holds_open_names_the_hook() -> None:
    class Opened(InAChild):
        """For many tokens the layer is a product in Python, for few an operator."""

        def forward(self, x: Tensor) -> Tensor:
            few = x.shape[:-1].numel() < 4
            return packed_matmul(x, *self.store.parts()) if few else x @ self.store()

    model = with_packed_layers(Opened)
    surgery.splice(model, surgery.method("lora", ports=("all",)), example_inputs=inputs("llama"))
    with pytest.raises(surgery.ForwardError, match=r"branches on its input .* is_leaf hook"):
        model(input_ids=IDS[:1, :1])
