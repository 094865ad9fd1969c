"""Tiny models and data, made once for each process that runs tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import transformers as tr

from tests.support.models import build

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a the film is good bad very not . , and it of to".split()


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``tiny.prepared`` puts what it makes."""
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(autouse=True)
def _made_up_data_only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("data") is None:
        monkeypatch.delenv("SURGERY_DATA", raising=False)


@pytest.fixture
def real() -> Path:
    """The folder of the real data sets."""
    return Path(os.environ["SURGERY_DATA"])


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A tiny encoder with a tokenizer of a few words, saved as a local folder."""
    folder = tmp_path / "model"
    build("bert").save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tr.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder
