"""Tests of what a host keeps: the children that its graphs call, and its graphs; how long."""

from __future__ import annotations

import functools
import gc
import linecache
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import surgery
from surgery.host import Variant, selection
from tests.support.forwards import Attention, pair, tokens
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
    kept = vars(attn)["_surgery"]
    assert kept.everything.recent
    assert kept.everything.children is not None
    replica = attn._replicate_for_data_parallel()
    for name, child in attn.named_children():
        replica._modules[name] = child
    assert torch.equal(replica(x)[0], attn(x)[0])
    assert kept.everything.children.belongs_to(attn)
    gone = weakref.ref(replica)
    del replica
    assert gone() is None


def test_data_parallel_replicas_share_a_spliced_model() -> None:
    model = with_three_methods(build("gpt2"), "gpt2")
    with torch.no_grad():
        parallel = nn.parallel.DataParallel(model)
        assert torch.equal(parallel(**inputs("gpt2"))[0], logits(model, inputs("gpt2")))


class ManyKinds(Attention):
    """Each name of an argument, and each length, needs a graph of its own; identities do not."""

    def forward(self, x: Tensor, request: str = "", step: int = 0, **options: Any) -> Tensor:
        return super().forward(x) * int(x.shape[1]) + (step >= 0)


def graphs_of(model: nn.Module) -> list[Any]:
    return surgery.variants(model)[""]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*kinds, each with a graph")
@settings(max_examples=4, phases=(Phase.explicit, Phase.generate))  # each capture takes a while
@given(kinds=st.lists(st.integers(1, 9), min_size=12, max_size=24))
@example(kinds=[1, 1, 3, 4, 5, 6, 8, 1, 2, 7, 1, 3])
def test_the_graph_that_was_used_longest_ago_goes_and_comes_back_when_it_is_needed(
    kinds: list[int],
) -> None:
    base, model = kinds_pair()
    surgery.refresh(model)
    made: dict[int, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "KEPT", 7)
        for at, kind in enumerate(kinds):
            before = graphs_of(model)
            assert torch.equal(model(tokens(kind)), base(tokens(kind)))
            now = graphs_of(model)
            new = [graph for graph in now if graph not in before]
            assert len(new) == (made.get(kind) not in before)
            made.update(dict.fromkeys([kind], *new) if new else {})
            assert len(now) <= 7
            latest = list(dict.fromkeys(kinds[at::-1]))  # distinct, the latest first
            assert {made[each] for each in latest[: 7 - selection.ASKED_FIRST]} <= set(now)


@functools.cache
def kinds_pair() -> tuple[Any, Any]:
    return pair(ManyKinds)


def counts() -> tuple[int, int, int]:
    """What a process holds of graphs: files of generated lines, fx graphs, and variants."""
    gc.collect()
    lines = sum(name.startswith("<surgery graph") for name in linecache.cache)
    found = gc.get_objects()
    graphs, variants = (sum(type(each) is kind for each in found) for kind in (fx.Graph, Variant))
    return lines, graphs, variants


@torch.no_grad()
@pytest.mark.parametrize("many", [1000, pytest.param(10000, marks=pytest.mark.slow)])
def test_ten_thousand_calls_leave_as_many_graphs_as_a_few(many: int) -> None:
    _, model = pair(ManyKinds)

    def calls(numbers: range) -> None:
        for n in numbers:
            kind = {f"option{n}": None} if n % 20 == 0 else {}  # never seen before
            model(tokens(1 + n % 3), f"request {n}", n, **kind)

    with pytest.warns(UserWarning, match="more than 32 kinds") as told:
        calls(range(700))
    assert len(told) == 1
    before, objects = counts(), len(gc.get_objects())
    calls(range(700, many))
    assert all(now <= then for now, then in zip(counts(), before, strict=True))
    assert len(gc.get_objects()) < objects + 1000
    assert len(graphs_of(model)) == selection.KEPT


@pytest.mark.parametrize("drop", [surgery.refresh, surgery.remove])
def test_the_lines_of_a_graph_go_with_it(drop: Callable[[nn.Module], Any]) -> None:
    before = counts()
    _, model = pair(ManyKinds)
    for n in range(1, 4):
        model(tokens(n))
    lines = {"".join(linecache.getlines(name)) for name in linecache.cache if "<surgery" in name}
    assert {graph.code for graph in graphs_of(model)} <= lines
    drop(model)
    # What another test left may have gone meanwhile.
    assert all(now <= then for now, then in zip(counts(), before, strict=True))
