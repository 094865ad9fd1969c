"""A run of our own leaves no trace: no hook, mode, cache, random state or flag shows it."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import surgery
from tests.support.models import NAMES, build, inputs, logits


@pytest.mark.parametrize("name", ["lora", "prompt", "inducer"])
def test_hooks_of_the_user_do_not_fire_in_a_splice(name: str) -> None:
    model, fired = build("gpt2"), list[int]()
    model.transformer.h[0].mlp.register_forward_hook(lambda *_: fired.append(1))
    surgery.splice(model, surgery.method(name))
    assert not fired
    logits(model, inputs("gpt2"))
    assert fired


def test_a_capture_is_not_seen_by_modes_that_are_on() -> None:
    model = build("gpt2")
    surgery.splice(model, surgery.method("lora", rank=2))
    counts = []
    for _ in range(2):  # the first call of a new structure is captured
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**inputs("gpt2", batch=3, length=5), use_cache=False)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("name", NAMES)
def test_locate_leaves_no_trace(name: str) -> None:
    model = build(name).train()
    fired: list[str] = []
    for module in model.modules():
        module.register_forward_hook(lambda m, a, o: fired.append(type(m).__name__))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    surgery.locate(model, inputs(name))
    assert torch.equal(torch.get_rng_state(), state)
    assert fired == []
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_example_run_does_not_touch_a_given_cache() -> None:
    from transformers import DynamicCache

    model = build("llama")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**inputs("llama"), past_key_values=cache)
    given = {"input_ids": inputs("llama", 2, 1)["input_ids"], "past_key_values": cache}
    report = surgery.splice(model, surgery.method("lora"), example_inputs=given)
    assert cache.get_seq_length() == 7
    assert len(report.sites) == 2
    assert logits(model, given).shape == (2, 1, 60)
    assert cache.get_seq_length() == 8
