"""The hidden states of a block are ports: what they are, and which bias is added to them last."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tr
from torch import Tensor, nn

import surgery
from tests.support.models import IDS, NAMES, VOCABULARY, build, inputs

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
BIAS = {
    "gpt2": "transformer.h.0.mlp.c_proj.bias", "llama": "", "t5": "",
    "roberta": "roberta.encoder.layer.0.output.LayerNorm.bias",
    "bert": "bert.encoder.layer.0.output.LayerNorm.bias", "vit": "vit.layers.0.mlp.fc2.bias",
    "plain": "stack.0.narrow.bias", "neox": "gpt_neox.layers.0.attention.dense.bias",
    "opt": "model.decoder.layers.0.fc2.bias",
}  # fmt: skip


def made(name: str) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    if name in NAMES:
        return build(name), inputs(name)
    given, more = inputs("gpt2"), {"vocab_size": VOCABULARY, **IDS}
    if name == "t5":
        config: Any = tr.T5Config(**T5, **more, decoder_start_token_id=1)
        given["decoder_input_ids"] = given["input_ids"][:, :4]
        return tr.T5ForConditionalGeneration(config).eval(), given
    if name == "neox":
        config = tr.GPTNeoXConfig(**SMALL, intermediate_size=64, **more)
        return tr.GPTNeoXForCausalLM(config).eval(), given
    config = tr.OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, **more)
    return tr.OPTForCausalLM(config).eval(), given


def first(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(**given)
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize("name", BIAS)
def test_the_bias_that_is_added_last_is_known(name: str) -> None:
    model, given = made(name)
    blocks = [*surgery.locate(model, given).block]
    assert [block.port("output").bias for block in blocks][:1] == [BIAS[name]]
    assert {block.port("output").width for block in blocks} == {32}
    assert len(blocks) == (4 if name == "t5" else 2)


@pytest.mark.parametrize("name", BIAS)
def test_the_port_is_what_the_block_gives(name: str) -> None:
    model, given = made(name)
    base = first(model, given)
    blocks = surgery.locate(model, given).block
    hooked: list[Tensor] = []
    hooks = [
        model.get_submodule(block.path).register_forward_hook(
            lambda m, x, y: hooked.append((y if isinstance(y, Tensor) else y[0]).clone())
        )
        for block in blocks
    ]
    first(model, given)
    for hook in hooks:
        hook.remove()
    with surgery.watch(model, "output", at=blocks) as seen:
        assert torch.equal(first(model, given), base)
    assert all(
        torch.equal(seen[block, "output"], own) for block, own in zip(blocks, hooked, strict=True)
    )
    assert torch.equal(first(model, given), base)


@pytest.mark.parametrize("name", BIAS)
def test_what_is_inserted_behind_a_block_reaches_the_outputs_and_goes(name: str) -> None:
    model, given = made(name)
    base, own = first(model, given), {**model.state_dict()}
    block = next(iter(surgery.locate(model, given).block))
    direction, collected = torch.randn(32), list[Tensor]()
    report = surgery.insert(model, block, "output", lambda h: h + direction)
    moved = first(model, given)
    surgery.remove(model, report.name)
    module: Any = model.get_submodule(block.path)
    hook = module.register_forward_hook(
        lambda m, x, y: y + direction if isinstance(y, Tensor) else (y[0] + direction, *y[1:])
    )
    assert torch.equal(moved, first(model, given))
    hook.remove()
    assert not torch.equal(moved, base)
    surgery.read(model, block, "output", collected.append)
    assert torch.equal(first(model, given), base)
    assert len(collected) == 1
    surgery.remove(model)
    assert torch.equal(first(model, given), base)
    assert own.keys() == model.state_dict().keys()


def test_a_block_that_replaces_itself_by_a_module_of_its_input() -> None:
    model, given = made("gpt2")
    block = [*surgery.locate(model, given).block][1]
    surgery.replace(model, block, "output", nn.Identity())
    whole = first(model, given)
    surgery.remove(model)
    model.transformer.h = model.transformer.h[:1]
    assert torch.equal(whole, first(model, given))


def test_an_ffn_and_its_block_in_one_host_are_edited_in_any_order() -> None:
    outs = []
    for order in (("ffn", "block"), ("block", "ffn")):
        model, given = made("roberta")
        sites = surgery.locate(model, given)
        chosen = {"ffn": sites.ffn[0], "block": next(iter(sites.block))}
        assert chosen["ffn"].path == chosen["block"].path
        for kind in order:
            surgery.insert(model, chosen[kind], "output", lambda h: 2 * h, name=kind)
        outs.append(first(model, given))
    assert torch.equal(*outs)


@pytest.mark.parametrize("name", ["gpt2", "llama", "roberta"])
def test_an_edit_behind_a_block_is_drawn(name: str) -> None:
    model, given = made(name)
    block = next(iter(surgery.locate(model, given).block))
    surgery.insert(model, block, "output", nn.Identity())
    lines = surgery.diff(model, site=block.path).splitlines()
    assert any(line.startswith("+") and "at_output" in line for line in lines)
