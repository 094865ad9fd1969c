"""Saving: all that was trained, in one step, over nobody else's files."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from tests.support.models import build, inputs, logits, perturb
from tests.support.splices import built_with


def test_an_interrupted_save_leaves_the_old_one(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = surgery.load(build("roberta"), saved)
    expected = logits(model, inputs("roberta"))
    perturb(model, seed=12)
    for step in (0, 1):
        count = iter(range(9))
        replace = os.replace

        def interrupted(a: Any, b: Any, at: int = step, count: Any = count) -> None:
            if next(count) == at:
                raise KeyboardInterrupt
            replace(a, b)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", interrupted)
            with pytest.raises(KeyboardInterrupt):
                surgery.save(model, saved)
        again = surgery.load(build("roberta"), saved)
        assert torch.equal(logits(again, inputs("roberta")), expected)
    assert not list(saved.glob("*.tmp"))


def test_what_was_trained_beside_is_saved_along(saved: Path) -> None:
    description = json.loads((saved / "surgery.json").read_text())
    assert "classifier.dense.weight" in description["kept"]
    model = surgery.load(build("roberta", seed=0), saved)
    assert not list(saved.glob("*.bin")) + list(saved.glob("*.pkl"))
    assert "trainable" in repr(surgery.summary(model))


class NormedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(32), nn.Linear(32, 2)
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.out(self.norm(hidden[:, 0]))
        return result


@pytest.mark.parametrize("keep", ["classifier", "classifier.norm.weight"])
def test_a_kept_module_is_saved_with_its_buffers(keep: str, tmp_path: Path) -> None:
    def with_head() -> Any:
        model = build("roberta")
        torch.manual_seed(0)
        model.classifier = NormedHead()
        return model

    model = with_head()
    surgery.splice(model, surgery.method("lora", rank=2))
    surgery.freeze_base(model, keep=[keep], fresh=False)
    model.train()(**inputs("roberta"))
    model.eval()
    assert model.classifier.norm.num_batches_tracked == 1
    description = json.loads((surgery.save(model, tmp_path) / "surgery.json").read_text())
    assert "classifier.norm.running_mean" in description["kept"]
    assert "classifier.cache" not in description["kept"]
    again = surgery.load(with_head().eval(), tmp_path)
    assert torch.equal(logits(again, inputs("roberta")), logits(model, inputs("roberta")))
    surgery.save(again, tmp_path)  # with what was loaded
    third = surgery.load(with_head().eval(), tmp_path)
    assert torch.equal(logits(third, inputs("roberta")), logits(model, inputs("roberta")))


def test_a_gating_model_is_saved_like_any_other(tmp_path: Path) -> None:
    model = built_with("gpt2", surgery.method("inducer", variant="gating"))
    model.save_pretrained(tmp_path)
    assert any(tmp_path.iterdir())


def test_a_save_removes_no_file_but_its_predecessor(tmp_path: Path) -> None:
    model = built_with("gpt2", surgery.method("lora", rank=2))
    surgery.save(model, tmp_path)
    (first,) = tmp_path.glob("*.safetensors")
    theirs = tmp_path / "surgery-000000000000.safetensors"  # of somebody who is saving, too
    theirs.write_bytes(b"")
    perturb(model, seed=8)
    surgery.save(model, tmp_path)
    assert theirs.exists()
    assert not first.exists()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_an_adapter_can_be_read_by_those_who_may_read_new_files(tmp_path: Path) -> None:
    model = build("gpt2")
    surgery.splice(model, surgery.method("lora"))
    folder = surgery.save(model, tmp_path / "adapter")
    (tmp_path / "new").touch()
    modes = {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
    assert modes == {stat.S_IMODE((tmp_path / "new").stat().st_mode)}
