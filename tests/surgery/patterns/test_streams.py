"""Streams of one attention: each has its projections, its queries, its output."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import surgery
from tests.support.models import perturb
from tests.support.vision import HEADS, WIDTH, Joint


def made(**options: bool) -> tuple[Joint, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Joint(**options).eval()
    return model, {"text": torch.randn(2, 5, WIDTH), "image": torch.randn(2, 9, WIDTH)}


def weights(site: surgery.Site) -> dict[str, str]:
    return {name: port.weight for name, port in site.ports.items() if port.weight}


@pytest.mark.parametrize("rotate", [False, True])
def test_each_stream_is_a_site_with_its_own_projections(rotate: bool) -> None:
    model, inputs = made(rotate=rotate)
    sites = surgery.locate(model, inputs).attention.expect(2)
    for site, stream in zip(sites, ("text", "image"), strict=True):
        ports = ("query", "key", "value", "output")
        assert weights(site) == {port: f"{stream}_{port}.weight" for port in ports}
        assert "lse" in site.ports
    assert [site.stream for site in sites] == [1, 2]
    assert not surgery.locate(model, inputs).overlooked


def test_a_stream_without_output_keeps_its_keys_and_refuses_virtual_ones() -> None:
    model, inputs = made(last=True)
    text, image = surgery.locate(model, inputs).attention.expect(2)
    assert set(weights(text)) == {"query", "key", "value"}
    assert set(weights(image)) == {"query", "key", "value", "output"}
    with pytest.raises(surgery.SiteError, match="no output of its own stream is computed"):
        surgery.splice(model, surgery.method("prefix"), at=text)
    surgery.splice(model, surgery.method("prefix", length=2), at=image)
    surgery.splice(model, surgery.method("lora", rank=2, ports=("key", "value")), name="b",
                   example_inputs=inputs)  # fmt: skip


def test_a_merge_of_all_streams_is_the_spliced_model() -> None:
    model, inputs = made(rotate=True)
    report = surgery.splice(
        model, surgery.method("lora", rank=2, ports="all"), example_inputs=inputs
    )
    assert len(report.inserted) == 8
    perturb(model)
    before = model(**inputs)
    surgery.merge(model)
    for ours, theirs in zip(model(**inputs), before, strict=True):
        torch.testing.assert_close(ours, theirs)


def by_hand(model: Joint, inputs: dict[str, Tensor], prefixes: dict[str, Any]) -> list[Tensor]:
    """A softmax over [prefix of the query's stream; keys of text and image]."""
    q, k, v = (model.heads(port, **inputs) for port in ("query", "key", "value"))
    q, k = model.turned(q), model.turned(k)
    results, start = [], 0
    for stream, x in inputs.items():
        rows = q[:, start : start + x.shape[1]].transpose(1, 2)  # (B, H, n, d)
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        if stream in prefixes:
            batch = x.shape[0]
            own = prefixes[stream]
            keys = torch.cat([own.keys.expand(batch, -1, -1, -1), keys], 2)
            values = torch.cat([own.values.expand(batch, -1, -1, -1), values], 2)
        mixed = (rows @ keys.mT / math.sqrt(WIDTH // HEADS)).softmax(-1) @ values
        out = getattr(model, f"{stream}_output")
        results.append(out(mixed.transpose(1, 2).flatten(2)))
        start += x.shape[1]
    return results


@given(
    streams=st.sets(st.sampled_from(["text", "image"]), min_size=1),
    rotate=st.booleans(),
    n=st.integers(1, 6),
    m=st.integers(1, 6),
)
def test_virtual_tokens_are_for_the_queries_of_their_stream(
    streams: set[str], rotate: bool, n: int, m: int
) -> None:
    model, inputs = made(rotate=rotate)
    model.double()
    inputs = {name: x.double() for name, x in inputs.items()}
    sites = dict(zip(inputs, surgery.locate(model, inputs).attention, strict=True))
    report = surgery.splice(
        model, surgery.method("prefix", length=3), at=[sites[s] for s in inputs if s in streams]
    )
    perturb(model, 1.0)
    modules = [model.get_submodule(i.path) for i in report.inserted]
    prefixes = dict(zip([s for s in inputs if s in streams], modules, strict=True))
    other = {"text": torch.randn(3, n, WIDTH).double(), "image": torch.randn(3, m, WIDTH).double()}
    for ours, theirs in zip(model(**other), by_hand(model, other, prefixes), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)  # rotated in complex64


def test_inducers_of_both_streams_start_equal_and_train() -> None:
    model, inputs = made(rotate=True)
    base = model(**inputs)
    surgery.splice(model, surgery.method("inducer", key_rank=2, value_rank=2),
                   example_inputs=inputs)  # fmt: skip
    assert all(map(torch.equal, model(**inputs), base))
    surgery.freeze_base(model)
    sum(y.square().mean() for y in model(**inputs)).backward()
    trained = [p for _, p in surgery.spliced_parameters(model) if p.grad is not None]
    assert len(trained) == len(list(surgery.spliced_parameters(model)))


class Merged(nn.Module):
    """A decoder's own tokens and a memory in one attention, projected by the same weights.

    The keys and values of the memory are made once and kept.
    """

    def __init__(self) -> None:
        super().__init__()
        for name in ("query", "key", "value", "output"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH))

    def forward(
        self, x: Tensor, memory: Tensor, kept: tuple[Tensor, ...] = (), odd: bool = False
    ) -> Any:
        def heads(t: Tensor) -> Tensor:
            return t.unflatten(-1, (HEADS, -1)).transpose(1, 2)

        if not kept:
            kept = heads(self.key(memory)), heads(self.value(memory))
        key = torch.cat([heads(self.key(x)), kept[0]], 2)
        value = torch.cat([heads(self.value(x)), kept[1]], 2)
        y = F.scaled_dot_product_attention(heads(self.query(x)), key, value)
        if odd:  # the memory once more, in a way that is no attention
            y = y + (heads(self.query(x)) @ heads(self.key(memory)).mT).sigmoid() @ heads(
                self.value(memory)
            )
        return self.output(y.transpose(1, 2).flatten(2)), kept


def test_weights_that_run_where_nothing_is_recognised_are_an_error() -> None:
    """The stream's keys were kept, but its weights run once more."""
    torch.manual_seed(0)
    model, x, memory = Merged().eval(), torch.randn(2, 3, WIDTH), torch.randn(2, 5, WIDTH)
    surgery.splice(model, surgery.method("lora", rank=2), example_inputs=(x, memory))
    _, kept = model(x, memory)
    with pytest.raises(surgery.SurgeryError, match="not recognised"):
        model(x, memory, kept, True)


def test_a_weight_of_two_streams_is_not_merged() -> None:
    torch.manual_seed(0)
    model, given = Merged().eval(), (torch.randn(2, 3, WIDTH), torch.randn(2, 5, WIDTH))
    sites = surgery.locate(model, given)
    surgery.splice(model, surgery.method("lora", rank=2, ports=("query", "value")), at=sites)
    perturb(model, 0.3)
    expected = model(*given)[0]
    with pytest.raises(surgery.SpliceError, match=r"another site runs its weight value\.weight"):
        surgery.merge(model)
    merged = surgery.merge(model, partial=True)
    assert [i.edit.port for i in merged.folded] == ["query"]
    torch.testing.assert_close(model(*given)[0], expected, rtol=1e-5, atol=1e-5)


def test_a_stream_that_was_kept_by_an_earlier_call_is_not_edited_again() -> None:
    torch.manual_seed(0)
    model, x, memory = Merged().eval(), torch.randn(2, 3, WIDTH), torch.randn(2, 5, WIDTH)
    surgery.splice(model, surgery.method("lora", rank=2), example_inputs=(x, memory))
    perturb(model, 0.3)
    expected, kept = model(x, memory)
    torch.testing.assert_close(model(x, memory, kept)[0], expected)
