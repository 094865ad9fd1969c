"""Prompts in plain PyTorch models: stacks in nn.Sequential, positions of every kind, windows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tr
from torch import Tensor, nn

import surgery
from tests.support.models import PlainBlock

WIDTH, HEADS, VOCABULARY, P = 32, 4, 60, 3
IDS = torch.arange(14).reshape(2, 7) * 3 + 2


def block() -> nn.Module:
    return PlainBlock(WIDTH, HEADS, prenorm=True, fused=True)


class Embedded(nn.Module):
    """Embeds tokens, with positions by number if there are any."""

    def __init__(self, numbered: bool = True) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(64, WIDTH) if numbered else None

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        return x if self.places is None else x + self.places(torch.arange(ids.shape[1]))


class SlicedTable(Embedded):
    """Adds the first rows of a table: no module is called with numbers."""

    def __init__(self) -> None:
        super().__init__(numbered=False)
        self.table = nn.Parameter(torch.randn(1, 64, WIDTH) * 0.1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.table[:, : ids.shape[1]]


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(WIDTH, WIDTH // HEADS) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(-2, -1) * (WIDTH // HEADS) ** -0.5
        hidden = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        return F.softmax(scores.masked_fill(hidden, float("-inf")), -1) @ self.value(x)


class HeadsBlock(nn.Module):
    """A module for each head, as in many a tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([Head() for _ in range(HEADS)])
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(torch.cat([head(x) for head in self.heads], -1))


class Encoder(nn.Module):
    """torch's own layers, causal by a mask or not."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, 0.0, batch_first=True)
        self.layers, self.causal = nn.TransformerEncoder(layer, 2), causal

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if self.causal else None
        return self.layers(x, mask=mask)


def head() -> nn.Module:
    return nn.Linear(WIDTH, VOCABULARY)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "all in one": lambda: nn.Sequential(Embedded(), block(), block(), head()),
    "stack in it": lambda: nn.Sequential(Embedded(), nn.Sequential(block(), block()), head()),
    "no positions": lambda: nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), block(), head()),
    "a sliced table": lambda: nn.Sequential(SlicedTable(), block(), block(), head()),
    "heads": lambda: nn.Sequential(Embedded(), nn.Sequential(HeadsBlock(), HeadsBlock()), head()),
    "torch, causal": lambda: nn.Sequential(Embedded(), Encoder(True), head()),
    "torch, causal, no positions": lambda: nn.Sequential(Embedded(False), Encoder(True), head()),
    "torch": lambda: nn.Sequential(Embedded(), Encoder(False), head()),
}


def concatenated(base: nn.Module, rows: Tensor, ids: Tensor) -> Tensor:
    """The outputs of the base on a longer sequence, in which rows replace the first embeddings."""
    (tokens,) = [m for m in base.modules() if getattr(m, "num_embeddings", 0) == VOCABULARY]
    front = rows.expand(len(ids), -1, -1)
    hook = tokens.register_forward_hook(lambda _, ids, x: torch.cat([front, x[:, len(rows) :]], 1))
    longer = torch.cat([ids[:, :1].expand(-1, len(rows)), ids], 1)
    out = base(longer)[:, len(rows) :]
    hook.remove()
    return out


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_is_rows_in_front_of_the_embeddings(name: str) -> None:
    torch.manual_seed(0)
    base = MODELS[name]().eval()
    model = copy.deepcopy(base)
    method = surgery.method("prompt", length=P, init="normal", std=0.5)
    surgery.splice(model, method, example_inputs=IDS)
    surgery.freeze_base(model)
    ((_, rows),) = surgery.spliced_parameters(model)
    for ids in (IDS, IDS[:1, :4]):
        found, expected = model(ids), concatenated(base, rows, ids)
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)
        assert (found - base(ids)).abs().max() > 1e-3
        gradients = [torch.autograd.grad(x.square().sum(), rows)[0] for x in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    surgery.remove(model)
    with torch.no_grad():
        assert torch.equal(model(IDS), base(IDS))


class Averaged(nn.Module):
    """Mixes tokens without attention, as a state space does."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


def test_tokens_that_mix_outside_attention_are_refused_where_the_prompt_runs_by_itself() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Embedded(), Averaged(), block(), block(), head()).eval()
    keys = set(model.state_dict())
    with pytest.raises(surgery.SiteError, match="tokens mix outside attention"):
        surgery.splice(model, surgery.method("prompt", length=P), example_inputs=IDS)
    assert set(model.state_dict()) == keys


WINDOW: dict[str, Any] = {"sliding_window": 6, "head_dim": 8, "num_key_value_heads": 2}
WINDOWED = {
    "some layers": lambda sizes: tr.Gemma3ForCausalLM(tr.Gemma3TextConfig(**sizes, **WINDOW)),
    "a capped score": lambda sizes: tr.Gemma2ForCausalLM(
        tr.Gemma2Config(attn_implementation="eager", attn_logit_softcapping=2.0, **sizes, **WINDOW)
    ),
    "all layers": lambda sizes: tr.MistralForCausalLM(tr.MistralConfig(**sizes, **WINDOW)),
}


@pytest.mark.parametrize("name", WINDOWED)
@torch.no_grad()
def test_a_token_sees_what_its_window_leaves_of_the_prompt(name: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    sizes |= {"intermediate_size": 64, "vocab_size": VOCABULARY, "pad_token_id": 0}
    base = WINDOWED[name](sizes).eval()
    for parameter in base.parameters():  # tiny models repeat one token otherwise
        parameter.add_(torch.randn_like(parameter) * 0.1)
    model = copy.deepcopy(base)
    surgery.splice(model, surgery.method("prompt", length=P, init="normal", std=0.5))
    ((_, rows),) = surgery.spliced_parameters(model)

    def expected(ids: Tensor, mask: Tensor) -> Tensor:
        embedded = base.get_input_embeddings()(ids)
        whole = torch.cat([rows.expand(2, -1, -1), embedded], 1)
        mask = torch.cat([torch.ones(2, P, dtype=torch.long), mask], 1)
        return base(inputs_embeds=whole, attention_mask=mask).logits[:, P:]

    ones, ids = torch.ones_like(IDS), IDS
    for n in (2, 5, 7):
        found = model(ids[:, :n]).logits
        torch.testing.assert_close(found, expected(ids[:, :n], ones[:, :n]), rtol=0, atol=5e-6)
    for _ in range(4):
        last = expected(ids, torch.ones_like(ids))[:, -1:].argmax(-1)
        ids = torch.cat([ids, last], 1)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    static = [{"cache_implementation": "static"}] if name == "all layers" else []
    for more in ({}, {"use_cache": False}, *static):
        assert torch.equal(model.generate(IDS, **options, **more), ids)


@torch.no_grad()
def test_positions_may_be_distances() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "n_layer": 2, "n_head": HEADS, "vocab_size": VOCABULARY}
    config = tr.BloomConfig(tie_word_embeddings=False, **sizes)  # tied ones repeat a token
    base = tr.BloomForCausalLM(config).eval()
    for parameter in base.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    model = copy.deepcopy(base)
    surgery.splice(model, surgery.method("prompt", length=P, init="normal", std=0.5))
    ((_, rows),) = surgery.spliced_parameters(model)
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    embedded = base.transformer.word_embeddings(IDS)
    whole = torch.cat([rows.expand(2, -1, -1), embedded], 1)
    longer = torch.cat([torch.ones(2, P, dtype=torch.long), mask], 1)
    expected = base(inputs_embeds=whole, attention_mask=longer).logits[:, P:]
    found = model(input_ids=IDS, attention_mask=mask).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    given = {"input_ids": IDS, "attention_mask": mask}
    cached = model.generate(**given, **options)
    assert torch.equal(cached, model.generate(**given, **options, use_cache=False))
    with surgery.disabled(model):
        assert not torch.equal(cached, model.generate(**given, **options))
