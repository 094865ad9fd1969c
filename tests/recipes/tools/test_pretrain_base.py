"""A small base is pretrained on the texts of the training sets."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import transformers as tr

from surgery.errors import RecipeError
from surgery_recipes.tools import pretrain_base
from tests.recipes import tiny


def options(root: Path, output: Path) -> argparse.Namespace:
    model, _ = tiny.prepared("webnlg", root)
    tiny.prepared("coqa", root)
    return argparse.Namespace(
        tokenizer=str(model), data=str(root), output=str(output), layers=1, width=16, heads=2,
        block=32, steps=40, batch=4, seed=0, rate=1e-2, bf16=False,
    )  # fmt: skip


def test_a_base_is_pretrained_on_the_texts_of_the_training_sets(root: Path, tmp_path: Path) -> None:
    chosen = options(root, tmp_path / "base")
    pretrain_base.pretrain(chosen)
    model = tr.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer = tr.AutoTokenizer.from_pretrained(tmp_path / "base")
    assert model.config.n_positions == chosen.block  # none that was never trained
    text = pretrain_base.texts(root)
    assert "Town 0 is in land 0." in text
    assert any(line.startswith("Once 0 things were.") for line in text)
    assert len(text) == len(set(text))
    blocks = pretrain_base.blocks(text, tokenizer, 32)
    assert blocks["labels"] == blocks["input_ids"]
    assert any(tokenizer.eos_token_id in block for block in blocks["labels"])  # it learns to end
    ids = blocks.with_format("torch")["input_ids"][:4]
    assert model(input_ids=ids, labels=ids).loss < 5.0  # of 257 tokens by chance: 5.5


def test_too_little_text_is_refused(root: Path) -> None:
    tokenizer = tr.AutoTokenizer.from_pretrained(tiny.prepared("webnlg", root)[0])
    with pytest.raises(RecipeError, match="are not enough for one block of 9"):
        pretrain_base.blocks(["ab"], tokenizer, 9)
