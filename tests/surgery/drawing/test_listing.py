"""A listing reads well and computes what its graph computes, before and after a splice."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery.drawing.host_graphs import HostGraphs, host_graphs
from surgery.drawing.listing import Listing
from surgery.interop import detached_copy, leaves
from surgery.plugin import CALLS
from surgery.testing import make_model
from surgery.testing.shapes import shape_of

SHAPES = ["fused", "grouped", "encoder", "eager", "encoder_decoder", "vision"]
METHODS: list[tuple[str, ...]] = [
    ("lora",),
    ("prefix", "lora"),
    ("inducer",),
    ("ia3", "ffn_adapter"),
]


def graphs(model: nn.Module, *methods: str, site: int = 0) -> HostGraphs:
    if methods:
        surgery.splice(model, methods)
    return host_graphs(model, surgery.locate(model)[site])


def texts(listing: Listing | None) -> list[str]:
    assert listing is not None
    return [step.text for step in listing.steps if step.text]


def computed(listing: Listing, host: nn.Module, site: surgery.Site) -> list[Any]:
    assert site.host is not None
    given = detached_copy((site.host.args, site.host.kwargs))
    return leaves(listing.function()(host, *leaves(given)))


def run(host: nn.Module, site: surgery.Site) -> list[Any]:
    assert site.host is not None
    args, kwargs = detached_copy((site.host.args, site.host.kwargs))
    return leaves(host(*args, **kwargs))


@pytest.mark.parametrize("methods", METHODS, ids="+".join)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.few(6)
def test_the_listing_computes_what_the_model_computes(shape: str, methods: tuple[str, ...]) -> None:
    inputs = dict(shape_of(shape).inputs)
    model = make_model(shape)
    surgery.splice(model, methods, example_inputs=inputs)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    sites = surgery.locate(model, inputs)
    moved = 0
    for site in [*sites, *(s for s in sites.others if s.kind not in CALLS)]:
        host, found = model.get_submodule(site.path), host_graphs(model, site)
        for listing, on in ((found.before, False), (found.after, True)):
            if listing is None:
                continue
            with torch.no_grad(), contextlib.nullcontext() if on else surgery.disabled(model):
                pairs = zip(computed(listing, host, site), run(host, site), strict=True)
                for a, b in pairs:
                    assert not isinstance(a, torch.Tensor) or torch.equal(a, b), site
        if found.after is not None:
            moved += str(found.before) != str(found.after)
    assert moved


def test_ports_name_variables_and_lines_name_their_source() -> None:
    before = graphs(make_model("grouped")).before
    assert "query = self.q_proj(input)" in texts(before)
    assert "output = self.o_proj(merged)" in texts(before)
    head, *lines = str(before).splitlines()
    assert head.startswith("def forward(self, input, ")
    assert head.endswith("# input is hidden_states")
    assert all("  # modeling_" in line for line in lines[:-1])
    source = next(step.where for step in before.steps if step.variable == "query")
    file, _, number = source.partition(":")
    attention = make_model("grouped").model.layers[0].self_attn
    path = inspect.getsourcefile(type(attention))
    assert path is not None
    assert path.endswith(file)
    with open(path) as text:
        assert "q_proj(" in text.readlines()[int(number) - 1]


def test_a_new_value_of_a_port_takes_its_name() -> None:
    found = graphs(make_model("encoder"), "ffn_adapter", site=1)
    before, after = texts(found.before), texts(found.after)
    new = [text for text in after if text not in before]
    assert [text for text in before if text not in after] == []
    assert [text.partition(" = ")[0] for text in new] == ["ffn_adapter_output", "output"]
    notes = {step.where for step in found.after.steps if step.inserted}  # type: ignore[union-attr]
    assert notes == {"ffn_adapter_output: add at output"}


def test_a_name_is_not_taken_over_while_the_old_value_is_read() -> None:
    after = graphs(make_model("fused"), "lora").after
    assert after is not None
    product = next(s for s in after.steps if "first_products_of" in s.text)
    assert "input" in product.text
    later = [s.text for s in after.steps if "self.lora_value, value, input" in s.text]
    assert later, texts(after)
    assert not any(text.startswith("input = ") for text in texts(after))


def test_two_sites_of_one_host_have_their_kinds_in_their_names() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = self.q(x) @ self.k(x).mT / 8**0.5
            y = x + self.o(scores.softmax(-1) @ self.v(x))
            return y + self.down(torch.relu(self.up(y)))

    model = nn.Sequential(Both())
    site = surgery.locate(model, torch.randn(1, 3, 8))[0]
    ports = {port for step in host_graphs(model, site).before.steps for port in step.ports}
    assert {"attention_output", "ffn_output", "query", "up"} <= ports


def test_hooks_let_values_through_and_sizes_lead_nowhere() -> None:
    before = graphs(make_model("encoder")).before
    numbers = {step.variable: n for n, step in enumerate(before.steps)}
    residual = next(s for s in before.steps if s.label == "add")
    assert numbers["hidden_states"] in residual.sources
    merged = next(s for s in before.steps if s.variable == "merged")
    assert merged.sources == (numbers["contiguous"],)
    view = next(s for s in before.steps if s.variable == "view")
    assert view.sources == (numbers["query"],)
