"""Sites are found by dataflow, with the right shapes, whatever things are called."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from tests.support.models import GENERATORS, NAMES, build, inputs, rename


@pytest.mark.parametrize("name", NAMES)
def test_every_attention_and_ffn_is_found_with_its_shape(name: str) -> None:
    sites = surgery.locate(build(name), inputs(name))
    assert len(sites.attention.expect(2)) == len(sites.ffn.expect(2)) == 2
    for site in sites.attention:
        assert (site.heads, site.head_width, site.width) == (4, 8, 32)
        assert site.kv_heads == (2 if name == "llama" else 4)
        assert site.causal == (name in (*GENERATORS, "plain"))
        assert not site.cross
        assert site.ports["key"].width == 8 * site.kv_heads
        assert site.scale == pytest.approx(8**-0.5)
    for site in sites.ffn:
        assert (site.ports["up"].width, site.ports["output"].width) == (
            64 * (1 + (name == "gpt2")),
            32,
        )
        assert ("gate" in site.ports) == (name == "llama")


@pytest.mark.parametrize("name", NAMES)
def test_example_inputs_come_from_a_transformers_model_itself(name: str) -> None:
    if name == "plain":
        with pytest.raises(surgery.SiteError, match="example_inputs"):
            surgery.locate(build(name))
    else:
        assert len(surgery.locate(build(name))) == 4


@pytest.mark.parametrize("name", NAMES)
def test_names_do_not_matter(name: str) -> None:
    model = build(name)
    before = surgery.locate(model, inputs(name))
    renamed = rename(model)
    after = surgery.locate(model, inputs(name))
    assert [s.ports.keys() for s in before] == [s.ports.keys() for s in after]
    assert [s.path for s in after] == [renamed[s.path] for s in before]


def test_no_site_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.Softmax(-1))
    x = torch.randn(2, 4)
    with pytest.raises(surgery.SiteError, match=r"no attention site.*2 linear sites"):
        surgery.splice(model, surgery.method("inducer"), example_inputs=x)
    with pytest.raises(surgery.SiteError, match="no site in ReLU"):
        surgery.locate(nn.ReLU(), x)
