"""Saving in PEFT's format: both files or neither, whatever interrupts."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from tests.support.models import build, inputs, logits, perturb


def spliced(rank: int) -> Any:
    model = build("gpt2")
    surgery.splice(model, surgery.method("lora", rank=rank))
    perturb(model)
    return model


def loaded(folder: Path) -> Any:
    return logits(surgery.load(build("gpt2"), folder), inputs("gpt2"))


@pytest.mark.parametrize("rank", [1, 2])  # the config stays, and is another
@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_an_interrupted_save_leaves_the_old_adapter_or_the_new_one(
    rank: int, fails_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = spliced(1), spliced(rank)
    perturb(new, seed=7)
    surgery.save(old, tmp_path, format="peft")
    replace, calls = os.replace, iter(range(1, 9))

    def failing(*paths: Any) -> None:
        if next(calls) == fails_at:
            raise KeyboardInterrupt
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with contextlib.suppress(KeyboardInterrupt):
            surgery.save(new, tmp_path, format="peft")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    found = loaded(tmp_path)
    expected = [logits(model, inputs("gpt2")) for model in (old, new)]
    assert any(torch.allclose(found, each, atol=1e-6) for each in expected)


def test_a_folder_with_an_adapter_of_the_own_format_is_refused(tmp_path: Path) -> None:
    model = spliced(1)
    surgery.save(model, tmp_path)
    with pytest.raises(surgery.StoreError, match="in the own format"):
        surgery.save(model, tmp_path, format="peft")
    assert not (tmp_path / "adapter_config.json").exists()


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(surgery.StoreError, match="cannot be written"):
        surgery.save(spliced(1), tmp_path / "file", format="peft")


def test_tensors_that_a_trainer_has_gathered_are_stored(tmp_path: Path) -> None:
    model = spliced(1)
    gathered = {name: torch.zeros_like(x) for name, x in surgery.spliced_parameters(model)}
    surgery.save(model, tmp_path, format="peft", state_dict=gathered)
    assert torch.equal(loaded(tmp_path), logits(build("gpt2"), inputs("gpt2")))
