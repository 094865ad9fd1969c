"""Trainers of a stand-in for TRL: what they are given as reference, and what they load."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from surgery.interop import imports
from surgery.interop.preference_trainers import _answer

LIBRARY = "standin_trl"
TRAINER = '''
"""A trainer that loads its reference, as TRL's do."""


def create_model_from_path(path):
    return f"loaded {path}"


class PreferenceTrainer:
    def __init__(self, model, args=None, fails=False):
        self.ref_model = create_model_from_path("base")
        if fails:
            raise ValueError("fails")


class SpecialTrainer(PreferenceTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class OtherTrainer:
    def __init__(self, model):
        self.teacher = create_model_from_path("teacher")
'''


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / LIBRARY).mkdir()
    (tmp_path / LIBRARY / "__init__.py").write_text("")
    (tmp_path / LIBRARY / "trainer.py").write_text(TRAINER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield
    for name in [n for n in sys.modules if n.split(".")[0] == LIBRARY]:
        del sys.modules[name]


def arm(seen: list[Any]) -> None:
    def make(model: nn.Module, written: bool) -> nn.Module | None:
        seen.append(written)
        return None if isinstance(model, nn.Tanh) else model

    imports.on_import(LIBRARY, lambda module: _answer(make, module))


@pytest.mark.parametrize("first", ["the library", "the splice"])
def test_a_trainer_is_given_its_reference_whichever_comes_first(library: None, first: str) -> None:
    seen: list[Any] = []
    if first == "the splice":
        arm(seen)
    module: Any = importlib.import_module(f"{LIBRARY}.trainer")
    if first == "the library":
        arm(seen)
    arm(seen)  # a second splice changes nothing
    model = nn.ReLU()
    assert module.PreferenceTrainer(model).ref_model is model
    assert module.SpecialTrainer(model=model).ref_model is model
    assert seen == [False, False]
    assert copy.copy(module.__spec__.loader).get_source(module.__name__) == TRAINER
    assert module.PreferenceTrainer.__init__.__name__ == "__init__"
    assert module.__loader__.get_source(module.__name__) == TRAINER


def test_all_else_loads_as_before(library: None) -> None:
    seen: list[Any] = []
    arm(seen)
    module: Any = importlib.import_module(f"{LIBRARY}.trainer")
    assert module.PreferenceTrainer("name").ref_model == "loaded base"
    assert module.PreferenceTrainer(nn.Tanh()).ref_model == "loaded base"  # not spliced
    assert module.OtherTrainer(nn.ReLU()).teacher == "loaded teacher"
    with pytest.raises(ValueError, match="fails"):
        module.PreferenceTrainer(nn.ReLU(), fails=True)
    assert module.create_model_from_path("base") == "loaded base"  # outside of a trainer


def test_a_synchronised_reference_is_known_to_be_written_to(library: None) -> None:
    seen: list[Any] = []
    arm(seen)
    module: Any = importlib.import_module(f"{LIBRARY}.trainer")
    settings = type("Settings", (), {"sync_ref_model": True})()
    module.PreferenceTrainer(nn.ReLU(), args=settings)
    assert seen == [True]


def test_a_blocked_library_is_left_alone(library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, LIBRARY, None)  # type: ignore[arg-type]
    arm([])
    with pytest.raises(ImportError):
        importlib.import_module(LIBRARY)
