"""Ablation and transplants: equal to the same done by hand, saved and loaded, removed exactly."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import surgery
from tests.support.models import build, inputs, logits

NAMES = ("gpt2", "llama", "bert", "vit")


@pytest.mark.parametrize("name", NAMES)
def test_an_ablated_head_is_zero_and_the_others_keep_their_bits(name: str, tmp_path: Path) -> None:
    model, case = build(name), inputs(name)
    base = logits(model, case).detach()
    site = surgery.locate(model).attention[0]
    with surgery.watch(model, "merged", at=site) as seen:
        logits(model, case)
    kept = seen[site, "merged"].unflatten(-1, (4, 8))
    surgery.ablate(model, site, heads=[0, 2])
    with surgery.watch(model, "merged", at=site) as seen:
        ablated = logits(model, case).detach()
    now = seen[site, "merged"].unflatten(-1, (4, 8))
    assert torch.equal(now[:, :, [1, 3]], kept[:, :, [1, 3]])
    assert not now[:, :, [0, 2]].any()
    surgery.save(model, tmp_path)
    surgery.remove(model)
    assert torch.equal(logits(model, case), base)
    fresh = surgery.load(build(name), tmp_path)
    assert torch.equal(logits(fresh, case), ablated)


@pytest.mark.parametrize("name", NAMES)
def test_a_transplanted_site_computes_what_it_does_in_its_own_model(
    name: str, tmp_path: Path
) -> None:
    model, other, case = build(name), build(name, seed=5), inputs(name)
    base = logits(model, case).detach()
    sites = surgery.locate(model)
    surgery.transplant(other, model, sites)
    moved = logits(model, case).detach()
    by_hand, names = build(name), set[str]()
    for site in sites:
        names |= {n for port in site.ports.values() for n in (port.weight, port.bias) if n}
    own = dict(other.named_parameters())
    with torch.no_grad():
        for path, parameter in by_hand.named_parameters():
            if path in names:
                parameter.copy_(own[path])
    torch.testing.assert_close(moved, logits(by_hand, case).detach())
    assert not torch.equal(moved, base)
    surgery.save(model, tmp_path)
    surgery.remove(model)
    assert torch.equal(logits(model, case), base)
    assert torch.equal(logits(surgery.load(build(name), tmp_path), case), moved)


def test_what_does_not_fit_is_refused() -> None:
    model = build("gpt2")
    sites = surgery.locate(model)
    text = (
        "method 'ablate': transformer.h.0.attn has no head 4. Its 4 heads are numbered from 0; "
        "choose among them, or other sites."
    )
    with pytest.raises(surgery.MethodError, match=f"^{re.escape(text)}$"):
        surgery.ablate(model, sites.attention[0], heads=4)
    text = (
        "ablate: the FFN at transformer.h.0.mlp has no heads side by side (port 'merged'). Choose "
        "sites of locate(model).attention."
    )
    with pytest.raises(surgery.SiteError, match=f"^{re.escape(text)}$"):
        surgery.ablate(model, sites.ffn[0], heads=0)
    text = (
        "transplant: GPT2LMHeadModel has the shape (64, 192) for "
        "transformer.h.0.attn.c_attn.weight, which is (32, 96) in GPT2LMHeadModel. Give a model "
        "of the same architecture and sizes."
    )
    with pytest.raises(surgery.SiteError, match=f"^{re.escape(text)}$"):
        surgery.transplant(build("gpt2", head_width=16), model, sites.attention[0])
    text = (
        "transplant: LlamaForCausalLM has no transformer.h.0.mlp.c_proj.weight, which is (128, 32) "
    )
    with pytest.raises(surgery.SiteError, match=f"^{re.escape(text)}"):
        surgery.transplant(build("llama"), model, sites.ffn[0])
    assert not surgery.summary(model).reports
