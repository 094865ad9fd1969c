"""A folder with an adapter, saved beside the head that was trained with it."""

from pathlib import Path

import pytest

import surgery
from tests.support.models import build, perturb


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = build("roberta")
    surgery.splice(model, surgery.method("lora", rank=2))
    perturb(model)
    surgery.freeze_base(model, keep=["classifier"])
    return surgery.save(model, tmp_path / "adapter")
