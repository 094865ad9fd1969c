"""Tests of selections of sites."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import surgery
from tests.support.models import build, inputs, logits, perturb


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


def test_modules_are_chosen_by_their_names() -> None:
    model = build("llama")
    report = surgery.splice(
        model, surgery.method("lora", rank=2), at=surgery.locate(model).matching("k_proj|lm_head")
    )
    assert [i.path.rpartition(".")[2] for i in report.inserted] == ["lora_key"] * 2 + [
        "lora_output"
    ]
    assert report.left_out == []
    surgery.remove(model)
    sites = surgery.locate(model)
    both = sites.matching("q_proj").layers(0, 1) + sites.matching("v_proj").layers(0, 1)
    assert [site.picked for site in both] == [("query", "value")]
    assert [site.picked for site in sites.matching("q_proj") + sites.attention] == [(), ()]
    assert [s.path for s in sites.matching("layers.0") if s.picked] == []
    assert [s.path for s in sites.matching("lm_head").others] == []


def test_a_method_for_whole_sites_refuses_single_ports() -> None:
    model = build("llama")
    chosen = surgery.locate(model).matching("q_proj")
    with pytest.raises(surgery.SiteError, match="edits whole sites"):
        surgery.splice(model, surgery.method("prefix", length=2), at=chosen)


def test_picked_ports_are_saved_and_loaded(tmp_path: Path) -> None:
    model, case = build("gpt2"), inputs("gpt2")
    at = surgery.locate(model).matching("c_proj")
    surgery.splice(model, surgery.method("lora", rank=2), at=at)
    perturb(model)
    expected = logits(model, case)
    surgery.save(model, tmp_path)
    loaded = surgery.load(build("gpt2"), tmp_path)
    assert torch.equal(logits(loaded, case), expected)
    assert [i.edit.port for i in surgery.summary(loaded).reports[0].inserted] == ["output"] * 4


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(surgery.SiteError, match="no regular expression"):
        surgery.locate(build("llama")).matching("(")
