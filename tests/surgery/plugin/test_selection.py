"""Tests of selections of sites."""

from __future__ import annotations

import pytest

import surgery
from tests.support.models import build


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
