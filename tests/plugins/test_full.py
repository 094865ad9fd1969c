"""A head that belongs to a splice is switched, routed, saved, merged and removed with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import surgery
from tests.support.models import build, inputs, logits, perturb
from tests.support.splices import untouched

METHODS = [surgery.method("lora", rank=2), surgery.method("full", modules="classifier")]


def test_two_tasks_have_a_head_each(tmp_path: Path) -> None:
    model, given = build("roberta"), inputs("roberta", batch=3)
    base = logits(model, given)
    for name in ("sst2", "mnli"):
        surgery.splice(model, METHODS, name=name)
        assert torch.equal(logits(model, given), base)
    assert surgery.freeze_base(model).kept == ()
    perturb(model, 0.3)
    alone = {}
    for name in ("sst2", "mnli"):
        with surgery.using(model, name):
            alone[name] = logits(model, given)
    with surgery.route(["sst2", None, "mnli"]):
        together = logits(model, given)
    for row, expected in enumerate([alone["sst2"], base, alone["mnli"]]):
        torch.testing.assert_close(together[row], expected[row], rtol=1e-5, atol=1e-6)
    surgery.save(model, tmp_path / "mnli", only="mnli")
    fresh = surgery.load(build("roberta"), tmp_path / "mnli")
    assert torch.equal(logits(fresh, given), alone["mnli"])
    surgery.use(model, "sst2")
    merged = surgery.merge(model)
    torch.testing.assert_close(logits(model, given), alone["sst2"], rtol=1e-5, atol=1e-6)
    merged.undo(model)
    surgery.remove(model)
    assert torch.equal(logits(model, given), base)
    assert untouched(model)


def test_it_trains_like_the_layer_itself() -> None:
    layer, x = nn.Sequential(nn.Linear(5, 3)), torch.randn(4, 5)
    plain = nn.Linear(5, 3)
    plain.load_state_dict(layer[0].state_dict())
    surgery.splice(layer, surgery.method("full", modules="0"), example_inputs=x)
    surgery.freeze_base(layer)
    for model in (layer, plain):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize(
    ("modules", "message"),
    [("head_of_another", "path has the pattern"), ("(a+)+b", "ends soon"), ("", "ends soon")],
)
def test_a_pattern_that_fits_nothing_is_refused(modules: str, message: str) -> None:
    with pytest.raises(surgery.RefusedError, match=message):
        surgery.splice(build("roberta"), surgery.method("full", modules=modules))


def test_several_that_are_on_add_up_and_one_loads_beside_another(tmp_path: Path) -> None:
    """In whatever order: each adds what it moves."""
    given = inputs("roberta")
    alone, base = {}, logits(build("roberta"), given)
    for name, noise in (("a", 0.2), ("b", 0.5)):
        model = build("roberta")
        surgery.splice(model, surgery.method("full", modules="out_proj"), name=name)
        perturb(model, noise)
        alone[name] = logits(model, given)
        surgery.save(model, tmp_path / name)
    both = {}
    for order in ("ab", "ba"):
        model = build("roberta")
        for name in order:
            surgery.load(model, tmp_path / name)
        both[order] = logits(model, given)
        for name in order:
            with surgery.using(model, name):
                assert torch.equal(logits(model, given), alone[name])
        surgery.merge(model)
        torch.testing.assert_close(logits(model, given), both[order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both["ab"], both["ba"], rtol=1e-5, atol=1e-5)
    expected = base + (alone["a"] - base) + (alone["b"] - base)
    torch.testing.assert_close(both["ab"], expected, rtol=1e-5, atol=1e-5)
