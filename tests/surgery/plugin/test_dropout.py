"""Tests of surgery.Dropout: its own random stream, and gradient checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
)

import surgery
from tests.support.models import checkpointing

X = torch.ones(40, 50)


def mask(dropout: surgery.Dropout, x: Tensor = X) -> Tensor:
    return dropout(x) != 0


def test_dropout_leaves_the_global_random_state_untouched() -> None:
    state = torch.get_rng_state()
    surgery.Dropout(0.5)(X)
    assert torch.equal(torch.get_rng_state(), state)


def test_manual_seed_reproduces_a_sequence_of_masks() -> None:
    dropout = surgery.Dropout(0.5)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        torch.rand(1)
        first = mask(dropout), mask(dropout)
        torch.rand(1)
        runs.append((*first, mask(dropout)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_seeded_run_of_draws_and_masks_comes_again() -> None:
    dropout = surgery.Dropout(0.5)

    def run() -> list[Tensor]:
        torch.manual_seed(3)
        return [mask(dropout) for _ in range(3) if torch.rand(1).numel()]

    assert all(map(torch.equal, run(), run()))


def test_masks_differ_between_seeds() -> None:
    dropout = surgery.Dropout(0.5)
    torch.manual_seed(0)
    first = mask(dropout)
    torch.manual_seed(1)
    assert not torch.equal(mask(dropout), first)


def test_masks_differ_between_calls_with_and_without_a_draw_in_between() -> None:
    dropout = surgery.Dropout(0.5)
    torch.manual_seed(0)
    masks = [mask(dropout), mask(dropout), mask(dropout)]
    torch.rand(1)
    masks += [mask(dropout), mask(dropout)]
    pairs = [(a, b) for i, a in enumerate(masks) for b in masks[:i]]
    assert not any(torch.equal(a, b) for a, b in pairs)


def test_masks_differ_between_modules() -> None:
    torch.manual_seed(0)
    assert not torch.equal(mask(surgery.Dropout(0.5)), mask(surgery.Dropout(0.5)))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_mean_keeps(p: float) -> None:
    torch.manual_seed(0)
    kept = surgery.Dropout(p)(torch.ones(500, 500))
    assert kept.mean().item() == pytest.approx(1, abs=0.03)  # 5 standard deviations at p = 0.9
    assert (kept == 0).float().mean().item() == pytest.approx(p, abs=0.01)
    assert kept.max().item() == pytest.approx(1 / (1 - p))


def test_evaluation_and_probability_zero_return_the_input_itself() -> None:
    assert surgery.Dropout(0.5).eval()(X) is X
    assert surgery.Dropout(0.0)(X) is X


def test_the_gradient_is_the_mask_that_was_drawn() -> None:
    x = X.clone().requires_grad_()
    y = surgery.Dropout(0.25)(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    assert surgery.Dropout(0.5)(X.to(dtype)).dtype == dtype


class Block(nn.Module):
    """Two of our dropouts, and with ``own`` the base model's dropout between them."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        middle = nn.Dropout(0.3) if own else nn.Identity()
        parts = [nn.Linear(8, 8), surgery.Dropout(0.4), middle, nn.Linear(8, 8)]
        self.layers = nn.Sequential(*parts, surgery.Dropout(0.4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


Run = Callable[[nn.Module, Tensor], Tensor]


def gradients(blocks: nn.ModuleList, run: Run, forwards: int) -> list[Tensor]:
    """Gradients of the parameters after some forwards and one joint backward."""
    blocks.zero_grad()
    loss = torch.zeros(())
    for i in range(forwards):
        x = torch.linspace(-1, 1, 32).reshape(4, 8).requires_grad_() * (i + 1)
        for block in blocks:
            x = run(block, x)
        loss = loss + (x**2).sum()
    loss.backward()
    return [p.grad.clone() for p in blocks.parameters()]


def same_gradients(own: bool, plain: Run, checkpointed: Run, forwards: int) -> None:
    """Compare two copies of the same blocks, under the same seeds, over three steps."""
    torch.manual_seed(0)
    one = nn.ModuleList([Block(own), Block(own)])
    other = copy.deepcopy(one)
    for step in range(3):
        torch.manual_seed(step)
        expected = gradients(one, plain, forwards)
        torch.manual_seed(step)
        actual = gradients(other, checkpointed, forwards)
        for a, b in zip(actual, expected, strict=True):  # sums may run in another order
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def call(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


def twice(block: nn.Module, x: Tensor) -> Tensor:
    return block(block(x))


@pytest.mark.parametrize("forwards", [1, 2, 3])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("run", [call, twice])
def test_checkpointing_recomputes_with_the_same_masks(
    run: Run, reentrant: bool, own: bool, forwards: int
) -> None:
    def checkpointed(block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(run, block, x, use_reentrant=reentrant)

    same_gradients(own, run, checkpointed, forwards)


@pytest.mark.parametrize("reentrant", [False, True])
def test_masks_differ_between_checkpointed_steps_without_a_draw_in_between(reentrant: bool) -> None:
    dropout = surgery.Dropout(0.5)
    torch.manual_seed(0)
    masks = []
    for _ in range(3):
        x = X.clone().requires_grad_()
        y = checkpoint(dropout, x, use_reentrant=reentrant)
        y.sum().backward()
        masks.append(y.detach() != 0)
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def gpt2(**options: Any) -> GPT2LMHeadModel:
    sizes = {"vocab_size": 30, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=2, **options)).train()


def model_gradients(model: GPT2LMHeadModel) -> list[Tensor]:
    ids = torch.arange(10).reshape(2, 5)
    torch.manual_seed(5)
    loss = sum(model(input_ids=x, use_cache=False).logits.square().sum() for x in (ids, ids + 9))
    loss.backward()
    return [p.grad.clone() for _, p in surgery.spliced_parameters(model)]


@pytest.mark.parametrize("base_dropout", [0.0, 0.1])
@pytest.mark.parametrize("method", ["lora", "inducer"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.few(4)
def test_a_checkpointed_spliced_model_has_the_gradients_of_a_plain_one(
    reentrant: bool, method: str, base_dropout: float
) -> None:
    torch.manual_seed(0)
    p = base_dropout
    model = gpt2(attn_pdrop=p, resid_pdrop=p, embd_pdrop=p)
    surgery.splice(model, surgery.method(method, dropout=0.3))
    with torch.no_grad():
        for _, parameter in surgery.spliced_parameters(model):
            parameter.normal_(std=0.3)
    checked = copy.deepcopy(model)
    checkpointing(checked, reentrant)
    if reentrant:
        checked.enable_input_require_grads()
    for a, b in zip(model_gradients(checked), model_gradients(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["lora", "inducer"])
def test_training_outputs_of_the_base_do_not_move_under_one_seed(method: str) -> None:
    torch.manual_seed(0)
    model = gpt2()
    ids = torch.arange(10).reshape(2, 5)
    torch.manual_seed(1)
    expected = model(input_ids=ids).logits
    surgery.splice(model, surgery.method(method, dropout=0.5))
    torch.manual_seed(1)
    assert torch.equal(model(input_ids=ids).logits, expected)
