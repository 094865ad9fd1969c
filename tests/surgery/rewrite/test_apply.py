"""Tests of the verbs of a port: each edits the value of its port and nothing else."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from surgery.errors import SpliceError
from surgery.testing import make_model
from tests.support.custom_methods import WIDTH, Fed, Scaled, Shift, Times, Twice, insert, refused
from tests.support.models import build, inputs, logits, perturb
from tests.support.splices import built_with


@pytest.mark.parametrize("start", ["none", "exact"])
@pytest.mark.parametrize(
    ("bend", "what"),
    [
        (lambda h: h[..., :1], r"\(2, 7, 1\) torch.float32, where port 'output' has \(2, 7, 32\)"),
        (lambda h: h[:, :1], r"x_output returns \(2, 1, 32\)"),
        (lambda h: h.double(), r"torch.float64, where port 'output' has .* torch.float32\. Return"),
        (lambda h: None, "x_output returns None"),
        (lambda h: (h, h), r"x_output returns a tuple of "),
    ],
)
def test_what_a_module_gives_must_fit_its_port(bend: Any, what: str, start: str) -> None:
    refused(insert(Shift(bend)), what, start)


def test_what_is_added_or_replaces_must_fit_too() -> None:
    narrow = nn.Linear(WIDTH, WIDTH - 1)
    refused(
        lambda s: s.port("output").add(narrow, "x", ("input",)), rf"returns \(2, 7, {WIDTH - 1}\)"
    )
    refused(lambda s: s.port("output").replace(narrow, "x", ("input",)), "where port 'output' has")
    refused(lambda s: s.port("up").feed(narrow, "x"), "x_up returns")


class Raw(nn.Module):
    """Attention and FFN of raw parameters in one module: their sites have one path and key."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {
            **dict.fromkeys(("wq", "wk", "wv", "wo"), (width, width)),
            "w1": (width, 32), "w2": (32, width),
        }.items():  # fmt: skip
            weight = torch.randn(shape, generator=generator) * 0.2
            self.register_parameter(name, nn.Parameter(weight))

    def mixed(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = ((x @ w).view(b, n, 4, -1).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
        return x + mixed @ self.wo

    def thought(self, x: Tensor) -> Tensor:
        return F.gelu(x @ self.w1) @ self.w2

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixed(x)
        return x + self.thought(x)


def test_an_edit_of_an_ffn_leaves_the_attention_beside_it() -> None:
    model, x = Raw().eval(), torch.randn(2, 5, 16)
    sites = surgery.locate(model, x)
    assert {(site.path, site.key) for site in sites} == {("", "")}
    surgery.splice(model, surgery.method("ffn_adapter", placement="pfeiffer", rank=2), at=sites.ffn)
    perturb(model, 0.5)
    y = model.mixed(x)
    thought = model.thought(y)
    expected = y + thought + model.ffn_adapter_output(thought)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
def test_merged_heads_keep_to_their_sequences(batch_first: bool) -> None:
    torch.manual_seed(0)
    base = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=batch_first).double().eval()
    x = torch.randn(2, 5, 16).double()
    expected = copy.deepcopy(base)
    expected.self_attn.out_proj.weight.data.mul_(1.5)
    half = Scaled("attention", "merged", 0.5, "none", adds=True)
    surgery.splice(base, half, example_inputs=x)
    torch.testing.assert_close(base(x), expected(x), rtol=0, atol=1e-12)


def test_one_module_may_serve_two_ports_of_a_fused_projection() -> None:
    x, one, two = inputs("gpt2"), build("gpt2"), build("gpt2")
    surgery.splice(one, Twice())
    surgery.splice(two, Fed())
    for model in (one, two):
        with torch.no_grad():
            for _, parameter in surgery.spliced_parameters(model):
                parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel()))
    torch.testing.assert_close(logits(one, x), logits(two, x), rtol=0, atol=1e-6)


def test_a_block_that_is_wrapped_can_be_edited_inside() -> None:
    x, model = inputs("roberta"), build("roberta")
    surgery.splice(model, surgery.method("ffn_adapter", placement="block", rank=2))
    surgery.splice(model, surgery.method("lora", ports=("up",)), name="b")
    other = build("roberta")
    surgery.splice(other, surgery.method("lora", ports=("up",)), name="b")
    surgery.splice(other, surgery.method("ffn_adapter", placement="block", rank=2))
    perturb(model)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(model, x), logits(other, x), rtol=0, atol=1e-6)


@dataclass(frozen=True)
class Greedy(Scaled):
    name = "greedy"

    def splice(self, site: surgery.Site) -> None:
        site.port("output").add(Times(site.width, 0.0), name="greedy", reads=("input", "output"))


def test_a_module_with_another_signature_is_named() -> None:
    with pytest.raises(SpliceError, match="the forward fails with greedy spliced in"):
        surgery.splice(build("gpt2"), Greedy())


def test_an_exact_splice_goes_inside_a_trained_one_around_its_block() -> None:
    model = built_with(
        "roberta", surgery.method("ffn_adapter", placement="block", rank=2), name="a"
    )
    before = logits(model, inputs("roberta"))
    surgery.splice(model, surgery.method("lora", ports=("up",), rank=2), name="b")
    assert torch.equal(logits(model, inputs("roberta")), before)


class _SeesMask(nn.Module):
    """Adds nothing, and notes what mask it was given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(width))
        self.masks: list[Any] = []

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        self.masks.append(mask)
        return x * self.factor


def test_a_module_that_reads_the_mask_gets_none_where_a_call_has_none() -> None:
    @dataclass(frozen=True)
    class Watching(surgery.Method):
        name = "watching"

        def splice(self, site: surgery.OpenSite) -> None:
            site.port("merged").add(_SeesMask(site.width), "seen", reads=("merged", "mask"))

    model: Any = make_model("fused")
    assert all("mask" not in site.ports for site in surgery.locate(model).attention)
    surgery.splice(model, Watching())
    ids = torch.arange(6)[None] + 3
    model(input_ids=ids)
    padded = torch.tensor([[0, 0, 1, 1, 1, 1]])
    model(input_ids=ids, attention_mask=padded)
    for module in model.modules():
        if isinstance(module, _SeesMask):
            without, given = module.masks[-2:]
            assert without is None
            assert given.shape[-2:] == (6, 6)
            hidden = ~given if given.dtype == torch.bool else given < -1
            assert hidden[0, 0, 5].tolist() == [True, True, False, False, False, False]
