"""Sites are found by dataflow, with the right shapes, whatever things are called."""

import pytest
import torch
from torch import nn

import surgery
from tests.models import GENERATORS, NAMES, build, inputs, logits, rename


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


def test_selections_are_sites_again() -> None:
    sites = surgery.locate(build("gpt2"))
    assert [s.path for s in sites.layers(1, 2)] == ["transformer.h.1.attn", "transformer.h.1.mlp"]
    assert len(sites.matching(r"h\.0").attention) == 1
    assert len(sites.attention + sites) == 4
    with pytest.raises(surgery.SiteError, match="expected 3 sites in GPT2LMHeadModel, found 2"):
        sites.attention.expect(3)
    text = repr(sites)
    assert "4 sites in GPT2LMHeadModel: 2 attention, 2 FFN" in text
    assert "causal self-attention" in text


def test_no_site_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.Softmax(-1))
    x = torch.randn(2, 4)
    with pytest.raises(surgery.SiteError, match=r"no attention site.*2 linear sites"):
        surgery.splice(model, surgery.method("inducer"), example_inputs=x)
    with pytest.raises(surgery.SiteError, match="no site in ReLU"):
        surgery.locate(nn.ReLU(), x)


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
