"""LoReFT, written with the ports that any author has: a block's output and what a call tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import surgery
from surgery.testing import check_method
from tests.support import loreft
from tests.support.loreft import LoReFT
from tests.support.models import build, inputs, losses_of_imitation, perturb

MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
LAST = {"cached": "the last tokens of a prompt are those of its first call"}


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    surgery.register(LoReFT)


def test_it_takes_at_most_45_lines() -> None:
    lines = Path(str(loreft.__file__)).read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 45


@pytest.mark.parametrize("shapes", [(), ("encoder_decoder", "vision")])
def test_the_contract(shapes: tuple[str, ...]) -> None:
    check_method(LoReFT(rank=2), shapes)


def test_the_contract_at_the_last_tokens() -> None:
    check_method(LoReFT(rank=2, first=1, last=2), exempt=LAST)


def by_hand(h: Tensor, module: Any, chosen: list[list[int]]) -> Tensor:
    """The equation, token by token."""
    moved = h.clone()
    for row, tokens in enumerate(chosen):
        for n in tokens:
            inside = module.weight @ h[row, n] + module.shift - module.rotate @ h[row, n]
            moved[row, n] = h[row, n] + module.rotate.T @ inside
    return moved


@pytest.mark.parametrize("name", ["gpt2", "llama", "roberta"])
@torch.no_grad()
def test_it_moves_the_first_and_last_tokens_of_each_row_alone(name: str) -> None:
    model, ids = build(name), inputs(name)["input_ids"]
    mask = MASK if name != "roberta" else MASK.flip(1)
    chosen = [[3, 4, 6], [0, 1, 6]] if name != "roberta" else [[0, 1, 3], [0, 1, 6]]
    surgery.splice(model, LoReFT(rank=2, first=2, last=1))
    perturb(model, 0.5)
    block = next(iter(surgery.locate(model).block))
    module = model.get_submodule(block.path).loreft_output
    with surgery.disabled(model), surgery.watch(model, "output", at=block) as seen:
        model(input_ids=ids, attention_mask=mask)
    with surgery.watch(model, "output", at=block) as tuned:
        model(input_ids=ids, attention_mask=mask)
    expected = by_hand(seen[block, "output"], module, chosen)
    torch.testing.assert_close(tuned[block, "output"], expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, seen[block, "output"], atol=1e-2)


@torch.no_grad()
def test_a_padded_prompt_is_continued_as_it_is_alone() -> None:
    model, ids = build("llama"), inputs("llama")["input_ids"]
    surgery.splice(model, LoReFT(rank=4, first=2, last=2))
    perturb(model, 0.5)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    both = model.generate(ids, attention_mask=MASK, **options)
    alone = model.generate(ids[:1, 3:], **options)
    assert torch.equal(both[0, 3:], alone[0])
    without = model.generate(ids[:1, 3:], use_cache=False, **options)
    assert not torch.equal(without, alone)  # every call is a prefill, so later tokens move, too


def test_it_learns() -> None:
    losses = losses_of_imitation("gpt2", LoReFT(rank=4, first=7), 0.02)
    assert losses[-1] < 0.2 * losses[0]
