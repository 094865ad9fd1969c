"""What a module reads of the running call: positions, padding, and how much is cached."""

from __future__ import annotations

import copy
import itertools
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers as tr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import surgery
from surgery.testing import batches, models
from tests.support.models import (
    IDS,
    VOCABULARY,
    PlainDecoder,
    build,
    checkpointing,
    inputs,
)

READS = ("positions", "padding", "cached")
CALLS: list[tuple[Tensor, Tensor, Tensor]] = []
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])


class Note(nn.Module):
    """Return y, and note what else is read."""

    def forward(self, y: Tensor, *reads: Tensor) -> Tensor:
        CALLS.append(tuple(x.clone() for x in reads))  # type: ignore[arg-type]
        return y


@dataclass(frozen=True)
class Notes(surgery.Method):
    """Note what can be read of a call, at one port of some kinds of site."""

    name = "notes"
    learns = False

    kinds: tuple[str, ...] = ("block", "attention", "ffn")  # type: ignore[assignment]
    port: str = "output"
    reads: tuple[str, ...] = field(default=READS)

    def suits(self, site: surgery.Site) -> bool:
        return site.kind in self.kinds and self.port in site.ports

    def splice(self, site: surgery.OpenSite) -> None:
        reads = (self.port, *self.reads)
        site.port(self.port).replace(Note(), name=self.name, reads=reads)


@contextmanager
def noted(model: nn.Module, example: Any = None, **options: Any) -> Iterator[list[Any]]:
    """Splice in what notes; give the notes of the forwards inside the ``with`` block."""
    surgery.splice(model, Notes(**options), example_inputs=example, name="notes")
    CALLS.clear()
    with torch.no_grad():
        yield CALLS
    surgery.remove(model, "notes")


def counted(mask: Tensor) -> Tensor:
    """The number of each real token in its row, by a loop."""
    rows = []
    for row in mask.tolist():
        seen, numbers = 0, []
        for real in row:
            seen += real
            numbers.append(max(seen - 1, 0))
        rows.append(numbers)
    return torch.tensor(rows)


def opt() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"ffn_dim": 64, "word_embed_proj_dim": 32, "vocab_size": VOCABULARY, **IDS}
    return tr.OPTForCausalLM(tr.OPTConfig(**sizes)).eval()


def t5() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config: Any = tr.T5Config(**sizes, vocab_size=VOCABULARY, decoder_start_token_id=1)
    return tr.T5ForConditionalGeneration(config).eval()


def made(name: str) -> Any:
    return {"opt": opt, "t5": t5}[name]() if name in ("opt", "t5") else build(name)


@pytest.mark.parametrize("port", ["output", "query", "query_heads", "key_heads", "input"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "roberta", "bert"])
def test_padding_and_positions_are_those_of_the_mask(name: str, port: str) -> None:
    model, ids = made(name), inputs("gpt2")["input_ids"]
    mask = LEFT if hasattr(model, "generate") and name not in ("roberta", "bert") else LEFT.flip(1)
    base = model(input_ids=ids, attention_mask=mask)[0].detach()
    with noted(model, port=port) as calls:
        assert torch.equal(model(input_ids=ids, attention_mask=mask)[0], base)
        assert len(calls) == {"output": 6, "input": 6}.get(port, 2)
        for positions, padding, cached in calls:
            assert torch.equal(positions.view(2, 7), counted(mask))  # of an FFN over one row, too
            assert torch.equal(padding.view(2, 7), mask.bool())
            assert cached.tolist() == 0
    assert torch.equal(model(input_ids=ids, attention_mask=mask)[0], base)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_batch_of_any_model_tells_its_mask(data: st.DataObject) -> None:
    model = data.draw(models())
    batch = data.draw(batches(model))
    base = model(**batch)[0].detach()
    with noted(model) as calls:
        assert torch.equal(model(**batch)[0], base)
        assert all(torch.equal(padding, batch["attention_mask"].bool()) for _, padding, _ in calls)
        assert all(torch.equal(p, counted(batch["attention_mask"])) for p, _, _ in calls)


@pytest.mark.parametrize("implementation", [None, "static"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_generation_tells_a_prefill_from_steps(name: str, implementation: str | None) -> None:
    model, ids = made(name), inputs("gpt2")["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    options |= {"attention_mask": LEFT, "cache_implementation": implementation}
    base = model.generate(ids, **options)
    with noted(model, kinds=("block",)) as calls:
        assert torch.equal(model.generate(ids, **options), base)
        steps = calls[1::2]  # the second block
    assert [int(cached) for _, _, cached in steps] == [0, 7, 8, 9]
    assert torch.equal(steps[0][0], counted(LEFT))
    assert [p.tolist() for p, _, _ in steps[1:]] == [[[n], [n + 3]] for n in (4, 5, 6)]
    assert torch.equal(steps[0][1], LEFT.bool())
    assert all(bool(padding.all()) for _, padding, _ in steps[1:])


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_steps_through_a_cache_have_the_positions_of_one_call(name: str) -> None:
    model, ids = made(name), inputs("gpt2")["input_ids"]
    for mask in (None, LEFT):

        def sliced(n: int, mask: Tensor | None = mask) -> dict[str, Any]:
            return {} if mask is None else {"attention_mask": mask[:, :n]}

        with noted(model, kinds=("block",)) as calls:
            model(input_ids=ids, **sliced(7))
            whole = calls[0]
            calls.clear()
            past, cuts = None, [0, 3, 4, 7]
            for start, stop in itertools.pairwise(cuts):
                given = {"past_key_values": past, "use_cache": True, **sliced(stop)}
                past = model(input_ids=ids[:, start:stop], **given).past_key_values
        assert [int(cached) for _, _, cached in calls] == [0, 0, 3, 3, 4, 4]
        for part in (0, 1):
            assert torch.equal(torch.cat([c[part] for c in calls[1::2]], 1), whole[part])


def test_given_position_ids_are_the_positions() -> None:
    model, ids = build("llama"), inputs("llama")["input_ids"]
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    with noted(model, kinds=("ffn",)) as calls:
        model(input_ids=ids, position_ids=packed)
        assert torch.equal(calls[0][0], packed.expand(2, 7))


def test_embeddings_in_place_of_ids_tell_as_much() -> None:
    model, ids = build("gpt2"), inputs("gpt2")["input_ids"]
    embedded = model.get_input_embeddings()(ids).detach()
    with noted(model, kinds=("ffn",)) as calls:
        model(attention_mask=LEFT, inputs_embeds=embedded)
        assert torch.equal(calls[0][0], counted(LEFT))


@pytest.mark.parametrize("name", ["vit", "plain"])
def test_a_model_that_numbers_no_tokens_counts_from_zero(name: str) -> None:
    model, example = build(name), inputs(name)
    with noted(model, example) as calls:
        model(**example)
        n = 5 if name == "vit" else 7
        for positions, padding, cached in calls:
            assert torch.equal(positions, torch.arange(n).expand(2, n))
            assert bool(padding.all())
            assert cached.tolist() == 0


def test_an_encoder_and_its_decoder_are_told_of_their_own_tokens() -> None:
    model, ids = t5(), inputs("gpt2")["input_ids"]
    given = {"input_ids": ids, "attention_mask": LEFT.flip(1)}
    with noted(model, {**given, "decoder_input_ids": ids[:, :4]}, kinds=("block",)) as calls:
        model.generate(**given, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert torch.equal(calls[0][1], LEFT.flip(1).bool())
    assert torch.equal(calls[0][0], counted(LEFT.flip(1)))
    assert [(p.tolist(), int(c)) for p, _, c in calls[2::2]] == [([[n], [n]], n) for n in range(3)]


def test_a_block_that_runs_by_itself_counts_from_zero() -> None:
    model = build("gpt2")
    with noted(model, kinds=("ffn",)) as calls:
        model.transformer.h[0].mlp(torch.randn(2, 3, 32))
        assert torch.equal(calls[0][0], torch.arange(3).expand(2, 3))


def test_a_mask_of_another_kind_is_an_error_that_names_the_read() -> None:
    model, ids = build("gpt2"), inputs("gpt2")["input_ids"]
    with noted(model, kinds=("ffn",), reads=("padding",)):
        with pytest.raises(
            surgery.ForwardError, match="reads 'padding', and the mask of this call"
        ):
            model(input_ids=ids, attention_mask=torch.zeros(2, 7, 7))


class Shortened(PlainDecoder):
    """A decoder whose blocks run on the first three tokens."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)[:, :3]
        for block in self.stack:
            x = block(x)
        return self.head(self.last(x))


def test_a_site_with_other_tokens_is_an_error() -> None:
    model, ids = Shortened().eval(), inputs("gpt2")["input_ids"]
    with noted(model, ids, kinds=("ffn",), reads=("positions",)):
        with pytest.raises(surgery.ForwardError, match="adds, drops or sorts tokens"):
            model(ids)


@pytest.mark.parametrize("name", ["gpt2", "llama", "roberta"])
def test_the_tokens_of_a_prompt_are_told_too(name: str) -> None:
    model, ids = build(name), inputs(name)["input_ids"]
    mask = LEFT if name != "roberta" else LEFT.flip(1)
    surgery.splice(model, surgery.method("prompt", length=3), name="prompt")
    with torch.no_grad():
        base = model(input_ids=ids, attention_mask=mask)[0]
    with noted(model, kinds=("block",)) as calls:
        with_notes = model(input_ids=ids, attention_mask=mask)[0]
        assert torch.equal(with_notes, base)
        padding = calls[-1][1]
        if name == "roberta":  # the sequence itself is longer
            assert torch.equal(padding, torch.cat([torch.ones(2, 3), mask], 1).bool())
            assert torch.equal(calls[-1][0], counted(padding.long()))
        else:  # the prompt has run by itself
            assert [c[1].shape for c in calls[::2]] == [(1, 3), (2, 7)]
            assert torch.equal(padding, mask.bool())


@pytest.mark.parametrize("read", READS)
def test_other_kinds_of_site_cannot_read_it(read: str) -> None:
    model = build("gpt2")
    with pytest.raises(surgery.PortError, match=f"no port '{read}'"):
        surgery.splice(model, Notes(kinds=("norm",), reads=(read,)))
    assert not hasattr(model, "_surgery_record")


def test_a_call_in_another_thread_has_its_own_tokens() -> None:
    model, ids = build("llama"), inputs("llama")["input_ids"]
    with noted(model, kinds=("block",)) as calls:

        def run() -> None:
            with torch.no_grad():
                model(input_ids=ids[:, :3])

        threads = [threading.Thread(target=run) for _ in range(2)]
        for each in threads:
            each.start()
        model(input_ids=ids)
        for each in threads:
            each.join()
        assert sorted(p.shape[1] for p, _, _ in calls) == [3, 3, 3, 3, 7, 7]


def test_a_call_that_fails_is_forgotten() -> None:
    model, ids = build("gpt2"), inputs("gpt2")["input_ids"]
    with noted(model, kinds=("ffn",)) as calls:
        with pytest.raises(IndexError):
            model(input_ids=ids + VOCABULARY)
        model.transformer.h[0].mlp(torch.randn(2, 3, 32))
        assert calls[0][0].shape == (2, 3)


def test_copies_and_the_next_splice_tell_too_and_removal_is_exact() -> None:
    model, ids = build("gpt2"), inputs("gpt2")["input_ids"]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    surgery.splice(model, Notes(kinds=("ffn",)), name="one")
    surgery.splice(model, Notes(kinds=("block",)), name="two")
    other = copy.deepcopy(model)
    for each in (model, other):
        CALLS.clear()
        with torch.no_grad():
            each(input_ids=ids, attention_mask=LEFT)
        assert len(CALLS) == 4
        assert all(torch.equal(p, counted(LEFT)) for p, _, _ in CALLS)
    surgery.remove(model, "one")
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == 1
    surgery.remove(model, "two")
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


class Weighed(nn.Module):
    """``h + w * positions``, in a prefill, at real tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(width))

    def forward(self, h: Tensor, positions: Tensor, padding: Tensor, cached: Tensor) -> Tensor:
        shift = positions[..., None] * self.w
        return torch.where((padding & (cached == 0))[..., None], h + shift, h)


@dataclass(frozen=True)
class Weighs(surgery.Method):
    """Add a learned vector times the position behind each block."""

    name = "weighs"
    kinds = ("block",)

    def splice(self, site: surgery.OpenSite) -> None:
        reads = ("output", *READS)
        site.port("output").replace(Weighed(site.width), name=self.name, reads=reads)


def weighed(name: str) -> Any:
    model = build(name)
    surgery.splice(model, Weighs())
    with torch.no_grad():
        for _, parameter in surgery.spliced_parameters(model):
            parameter.copy_(torch.linspace(-0.1, 0.1, 32))
    return model


@pytest.mark.parametrize("name", ["gpt2", "llama", "roberta"])
def test_a_compiled_model_is_told_without_a_break(name: str) -> None:
    model, ids = weighed(name), inputs(name)["input_ids"]
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(module: Any, _: Any) -> Any:
        graphs.append(module)
        return module.forward

    mask = LEFT if name != "roberta" else LEFT.flip(1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's own, about its own parts
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for given in ({}, {"attention_mask": mask}):
            torch.testing.assert_close(
                compiled(input_ids=ids, **given)[0], model(input_ids=ids, **given)[0]
            )
        assert len(graphs) == 2
        if name == "roberta":
            return
        outs = []
        for runs in (model, compiled):
            past, parts = None, []
            for start, stop in ((0, 4), (4, 5), (5, 6), (6, 7)):
                given = {"past_key_values": past, "use_cache": True}
                out = runs(input_ids=ids[:, start:stop], **given)
                past, parts = out.past_key_values, [*parts, out.logits]
            outs.append(torch.cat(parts, 1))
        torch.testing.assert_close(*outs)
        assert len(graphs) <= 5  # a prefill, a step, and a step of any length


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_what_a_layer_was_told(reentrant: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = weighed("llama").train()
        surgery.freeze_base(model)
        if checkpointed:
            checkpointing(model, reentrant)
            model.enable_input_require_grads()
        ids = inputs("llama")["input_ids"]
        model(input_ids=ids, attention_mask=LEFT, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for _, p in surgery.spliced_parameters(model)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(bool((g != 0).any()) for g in gradients[0])


def test_rows_of_a_route_read_their_own_positions() -> None:
    model, ids = build("llama"), inputs("llama")["input_ids"]
    for name in ("a", "b"):
        surgery.splice(model, Weighs(), name=name)
    with torch.no_grad():
        for number, (_, parameter) in enumerate(surgery.spliced_parameters(model)):
            parameter.copy_(torch.linspace(-0.1, 0.1, 32) * (number + 1))
        given = {"input_ids": ids, "attention_mask": LEFT}
        alone = {}
        for name in ("a", "b"):
            with surgery.using(model, name):
                alone[name] = model(**given).logits
        for route in (["a", "b"], ["b", "a"], [None, "b"]):
            with surgery.route(route):
                routed = model(**given).logits
            for row, name in enumerate(route):
                if name is not None:
                    torch.testing.assert_close(routed[row], alone[name][row])
