"""Prompts where the language model is called with embeddings, as beside a tower for images."""

from __future__ import annotations

import copy

import pytest
import torch

import surgery
from tests.zoo.build import build


def test_the_prompt_of_a_model_for_images_is_that_of_its_language_model() -> None:
    tiny = build("llava")
    model, ids = tiny.model, tiny.inputs["input_ids"]
    alone = copy.deepcopy(model.model.language_model)
    method = surgery.method("prompt", length=3)
    surgery.splice(model, method, example_inputs=tiny.inputs)
    surgery.splice(alone, method, example_inputs={"input_ids": ids})
    ours = dict(surgery.spliced_parameters(model))
    (theirs,) = dict(surgery.spliced_parameters(alone)).values()
    assert [p.shape for p in ours.values()] == [theirs.shape]
    with torch.no_grad():
        theirs.copy_(next(iter(ours.values())).normal_())
        logits = model(**tiny.inputs).logits
        hidden = alone(input_ids=ids, attention_mask=tiny.inputs["attention_mask"])
        expected = model.lm_head(hidden.last_hidden_state)
        base = model(**tiny.inputs, use_cache=False).logits
    torch.testing.assert_close(logits, expected)
    assert torch.equal(logits, base)
    with surgery.disabled(model):
        assert not torch.allclose(model(**tiny.inputs).logits, logits, atol=1e-3)


@pytest.mark.parametrize("name", ["paligemma", "idefics3"])
def test_a_tower_that_runs_keeps_its_own_positions(name: str) -> None:
    tiny = build(name)
    sites = surgery.locate(tiny.model, tiny.inputs)
    assert not [site.path for site in sites.position if "vision" in site.path]
    surgery.splice(tiny.model, surgery.method("prompt", length=3), at=sites)
    with torch.no_grad():
        whole = tiny.model(**tiny.inputs)[0]
        surgery.remove(tiny.model)
        assert not torch.allclose(tiny.model(**tiny.inputs)[0], whole, atol=1e-4)
