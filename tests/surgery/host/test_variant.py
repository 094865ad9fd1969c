"""Tests of the graphs of one host: which calls share one, and what each is good for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tr
from torch import Tensor

import surgery
from tests.support.forwards import Attention, check, drawn, pair, tokens, with_two_methods
from tests.support.models import TEXT, inputs, logits, perturb
from tests.support.splices import methods, with_inducer_and_lora


class Packed(Attention):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        chunks = [torch.split(t, lengths.tolist(), dim=2) for t in self.heads(x)]
        mixed = [F.scaled_dot_product_attention(q, k, v) for q, k, v in zip(*chunks, strict=True)]
        return self.merge(torch.cat(mixed, 2))


def test_chunks_of_a_packed_sequence_are_one_site() -> None:
    model = Packed().eval()
    example = (drawn(7, 1), torch.tensor([3, 4]))
    assert len(surgery.locate(model, example)) == 1
    cases = [((drawn(7, 1), torch.tensor(n)), {}) for n in ([3, 4], [2, 2, 3], [7], [4, 3])]
    check(model, example, cases)


@torch.no_grad()
def test_a_packed_sequence_equals_its_chunks_alone() -> None:
    model = with_two_methods(Packed().eval(), drawn(7, 1), torch.tensor([3, 4]))
    perturb(model)
    whole = drawn(9, 1)
    together = model(whole, torch.tensor([2, 3, 4]))
    parts = [model(part, torch.tensor([part.shape[1]])) for part in whole.split([2, 3, 4], 1)]
    torch.testing.assert_close(together, torch.cat(parts, 1), rtol=1e-5, atol=1e-6)


def test_a_call_pattern_without_end_is_reported() -> None:
    class Endless(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.heads(x)
            return self.merge(F.scaled_dot_product_attention(q, k, v)) * int(x.shape[1])

    model = with_two_methods(Endless().eval(), drawn())

    def many_lengths() -> None:
        for n in range(1, 40):
            model(drawn(n))

    with pytest.warns(
        UserWarning, match=r"more than 32 kinds.*x\.shape.*surgery\.variants"
    ) as told:
        many_lengths()
    assert len(told) == 1
    assert len(surgery.variants(model)[""]) == 32


@pytest.mark.parametrize("name", TEXT)
def test_other_lengths_and_batches_need_no_new_graph(name: str) -> None:
    model = with_inducer_and_lora(name)
    logits(model, inputs(name))
    before = {p: len(v) for p, v in surgery.variants(model).items()}
    for shape in ((1, 3), (3, 9), (4, 12)):
        logits(model, inputs(name, *shape))
    assert {p: len(v) for p, v in surgery.variants(model).items()} == before


class Widened(Attention):
    """Scores in a lower dtype take something of a wider one, in place; a constant is theirs."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.mT
        scores += torch.linspace(0, 1, x.shape[1])
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        return self.merge(scores.softmax(-1).to(v.dtype) @ v)


def test_autocast_chooses_the_graph() -> None:
    base, model = pair(Widened)
    for enabled in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert torch.equal(model(tokens()), base(tokens()))


def interleaved() -> Any:
    """A model whose fused projection has the queries, keys and values of each head side by side."""
    torch.manual_seed(0)
    config = tr.GPTNeoXConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    return tr.GPTNeoXForCausalLM(config).eval()


@pytest.mark.parametrize("first", ["inference", "export"])
def test_a_graph_captured_in_some_mode_serves_all_others(first: str) -> None:
    model, ids = interleaved(), torch.randint(0, 60, (2, 7))
    surgery.splice(model, methods(("lora", {"ports": ("query", "value")}), ("ia3", {})))
    perturb(model, 0.3)
    expected = copy.deepcopy(model)(input_ids=ids).logits
    other = {"input_ids": ids, "output_attentions": False}  # a call of another structure
    if first == "inference":
        with torch.inference_mode():
            model(**other)
    else:
        torch.export.export(model, (), other, strict=False)
    logits = model(**other).logits
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    assert all(p.grad is not None for _, p in surgery.spliced_parameters(model))
