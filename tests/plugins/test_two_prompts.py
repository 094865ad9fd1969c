"""Two prompts in one model: each runs by itself, and the tokens attend to both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import surgery
from tests.support.models import build, inputs, logits


def spliced(kind: str, names: str) -> Any:
    model = build(kind)
    for name in names:
        method = surgery.method("prompt", length={"a": 2, "b": 3}[name])
        surgery.splice(model, method, name=name, example_inputs=inputs(kind))
    for key, parameter in surgery.spliced_parameters(model):
        name = "a" if len(parameter) == 2 else "b"
        torch.manual_seed(ord(name))
        nn.init.normal_(parameter)
        assert "rows" in key
    return model


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.few(1)
def test_their_order_does_not_matter_and_both_count(kind: str) -> None:
    given = inputs(kind)
    both = logits(spliced(kind, "ab"), given)
    torch.testing.assert_close(both, logits(spliced(kind, "ba"), given), rtol=1e-5, atol=1e-5)
    for name in "ab":
        assert not torch.allclose(both, logits(spliced(kind, name), given), atol=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_model_gives_the_same_gradients(reentrant: bool) -> None:
    def gradients(checkpointed: bool) -> list[Tensor]:
        model, ids = spliced("gpt2", "ab"), inputs("gpt2")["input_ids"]
        through = torch.zeros(1, requires_grad=True)

        def run(ids: Tensor, through: Tensor) -> Tensor:
            return logits(model, {"input_ids": ids}) + through

        if checkpointed:
            out = checkpoint(run, ids, through, use_reentrant=reentrant)
        else:
            out = run(ids, through)
        out.square().sum().backward()
        return [p.grad for _, p in surgery.spliced_parameters(model)]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.few(1)
def test_one_that_is_off_leaves_the_other_as_it_is_alone(kind: str) -> None:
    model, given = spliced(kind, "ab"), inputs(kind)
    for name in "ab":
        with surgery.using(model, name):
            found = logits(model, given)
        torch.testing.assert_close(found, logits(spliced(kind, name), given))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_cache_and_gradients(kind: str) -> None:
    model = spliced(kind, "ab")
    ids = inputs(kind)["input_ids"]
    options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    with_cache = model.generate(ids, **options)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **options))
    logits(model, inputs(kind)).square().sum().backward()
    for _, parameter in surgery.spliced_parameters(model):
        assert parameter.grad is not None
        assert bool((parameter.grad != 0).any())
