"""The base gets new rows, the dtype of its recipe, and nothing else that is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr

import surgery
from surgery.adapter.reading import read
from surgery.adapter.training import trained_rows
from surgery.errors import RecipeError
from surgery_recipes.run import finetune
from surgery_recipes.run.build import embedding_names, load_base, planned_methods, splice, trainable
from surgery_recipes.run.prepare import prepare_run
from tests.recipes import tiny
from tests.recipes.run.runs import QUIET, recipe


def untied(folder: Path, tokenizer: Any, dtype: torch.dtype = torch.float32) -> Path:
    """A small Llama whose output embedding is its own."""
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = tr.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=512, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    tr.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def test_of_an_output_embedding_of_its_own_the_new_rows_are_trained(
    root: Path, tmp_path: Path
) -> None:
    tokenizer = tr.AutoTokenizer.from_pretrained(tiny.prepared("webnlg", root)[0])
    model = untied(tmp_path / "llama", tokenizer)
    made = recipe(
        "webnlg/lora", root, tmp_path / "run", f"model={model}", "data.with_segments=false"
    )
    prepared = prepare_run(made)
    base = load_base(prepared, 0)
    splice(base, prepared, planned_methods(made))
    names = embedding_names(base)
    assert names == ["model.embed_tokens.weight", "lm_head.weight"]
    assert trained_rows(base) == {name: list(prepared.new) for name in names}
    inserted = surgery.summary(base).inserted
    assert trainable(base) == inserted + 2 * len(prepared.new) * 32
    [row] = finetune.train(made, QUIET)
    saved = read(tmp_path / "run/adapter")[1]
    assert all(saved[f"rows.{name}"].shape == (len(prepared.new), 32) for name in names)
    assert finetune.evaluate(tmp_path / "run", QUIET) == row.scores


def test_weights_in_half_precision_are_trained_in_float32(root: Path, tmp_path: Path) -> None:
    tokenizer = tr.AutoTokenizer.from_pretrained(tiny.prepared("webnlg", root)[0])
    model = untied(tmp_path / "llama", tokenizer, torch.bfloat16)
    own = [f"model={model}", "data.with_segments=false"]
    for dtype, expected in (("float32", torch.float32), ("auto", torch.bfloat16)):
        made = recipe("webnlg/lora", root, tmp_path / dtype, *own, f"dtype={dtype}")
        prepared = prepare_run(made)
        base = load_base(prepared, 0)
        splice(base, prepared, planned_methods(made))
        inserted = {id(p) for _, p in surgery.spliced_parameters(base)}
        assert {p.dtype for p in base.parameters() if id(p) not in inserted} == {expected}
        assert {p.dtype for _, p in surgery.spliced_parameters(base)} == {torch.float32}
    with pytest.raises(RecipeError, match="dtype='half' must be float32 or auto"):
        recipe("webnlg/lora", root, tmp_path, "dtype=half")
