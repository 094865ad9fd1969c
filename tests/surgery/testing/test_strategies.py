"""The strategies for authors draw models, batches and sites that fit each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import surgery
from surgery.testing import MORE_SHAPES, SHAPES, batches, models, sites


def values(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**batch)[0]
    return out


@settings(max_examples=10)
@given(data=st.data())
def test_a_zero_initialised_residual_at_any_sites_of_any_model_changes_no_bit(data: Any) -> None:
    model = data.draw(models((*SHAPES, *MORE_SHAPES)))
    batch = data.draw(batches(model))
    before = values(model, batch)
    chosen = data.draw(sites(model))
    report = surgery.splice(model, surgery.method("lora", rank=2, ports=("all",)), at=chosen)
    assert {i.site.identity for i in report.inserted} == {site.identity for site in chosen}
    assert torch.equal(values(model, batch), before)
    for _, parameter in surgery.spliced_parameters(model):
        torch.nn.init.normal_(parameter)
    assert not torch.equal(values(model, batch), before)
    surgery.remove(model)
    assert torch.equal(values(model, batch), before)


@settings(max_examples=20)
@given(data=st.data())
def test_rows_are_padded_where_the_model_bears_it(data: Any) -> None:
    model = data.draw(models(["encoder"]))
    batch = data.draw(batches(model, rows=2, length=4))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.shape == mask.shape
    assert bool((mask[:, 0] == 1).all())  # an encoder numbers positions from the left
    assert bool(((ids == 0) == (mask == 0)).all())
    assert max(mask.sum(1)) == ids.shape[1]


def test_only_the_wanted_kinds_are_drawn() -> None:
    @settings(max_examples=5)
    @given(data=st.data())
    def law(data: Any) -> None:
        model = data.draw(models(["grouped"]))
        assert {site.kind for site in data.draw(sites(model, kinds=["ffn"]))} == {"ffn"}
        blocks = data.draw(sites(model, kinds=["block"]))
        assert not len(blocks)
        assert {site.kind for site in blocks.others} == {"block"}

    law()


@pytest.mark.parametrize("shape", ["encoder_decoder", "vision"])
def test_other_inputs_are_those_that_the_model_takes(shape: str) -> None:
    @settings(max_examples=5)
    @given(data=st.data())
    def law(data: Any) -> None:
        model = data.draw(models([shape]))
        assert torch.isfinite(values(model, data.draw(batches(model)))).all()

    law()
