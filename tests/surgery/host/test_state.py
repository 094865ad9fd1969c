"""Tests of the children that a host's graphs call, in replicas too, and of how long they live."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

import surgery
from tests.support.models import build, inputs, logits
from tests.support.splices import built_with, with_three_methods


def test_children_that_change_later_are_those_that_are_called() -> None:
    """A graph finds them in the host's own dictionary, and a replica of the host has another."""
    model, x = built_with("gpt2", surgery.method("lora", rank=2)), torch.randn(2, 5, 32)
    attn = model.transformer.h[0].attn
    attn(x)
    replica = attn._replicate_for_data_parallel()  # a flat copy, as DataParallel runs it
    replica.register_module("c_proj", nn.Linear(32, 32))
    replica._modules["c_attn"], replica._modules["lora_query"] = attn.c_attn, attn.lora_query
    expected = torch.randn(0)
    for _ in range(3):  # in turn, with graphs that are known by now
        seen: list[Tensor] = []
        hook = attn.c_proj.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0])
        )
        expected = attn(x)[0]
        hook.remove()
        torch.testing.assert_close(replica(x)[0], replica.c_proj(seen[0]), rtol=0, atol=1e-6)
        assert torch.equal(attn(x)[0], expected)
    attn.c_proj = replica.c_proj
    assert torch.equal(attn(x)[0], replica(x)[0])
    assert not torch.equal(attn(x)[0], expected)


def test_a_host_that_nobody_needs_is_gone_at_once() -> None:
    model, x = built_with("gpt2", surgery.method("lora", rank=2)), torch.randn(2, 5, 32)
    attn = model.transformer.h[0].attn
    for _ in range(3):
        attn(x)
    state = vars(attn)["_surgery"]
    assert state.everything.recent
    assert state.everything.children is not None
    replica = attn._replicate_for_data_parallel()
    for name, child in attn.named_children():
        replica._modules[name] = child
    assert torch.equal(replica(x)[0], attn(x)[0])
    assert state.everything.children.belongs_to(attn)
    gone = weakref.ref(replica)
    del replica
    assert gone() is None


def test_data_parallel_replicas_share_a_spliced_model() -> None:
    model = with_three_methods(build("gpt2"), "gpt2")
    with torch.no_grad():
        parallel = nn.parallel.DataParallel(model)
        assert torch.equal(parallel(**inputs("gpt2"))[0], logits(model, inputs("gpt2")))
