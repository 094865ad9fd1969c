"""New tokens: their embedding rows are trained and saved, and no other row changes by a bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import surgery
from surgery.adapter.training import trained_rows
from surgery_recipes.recipe_files import find_recipe, read_recipe
from surgery_recipes.run import finetune
from surgery_recipes.run.build import embedding_names, load_base, planned_methods, splice
from surgery_recipes.run.prepare import prepare_run
from surgery_recipes.run.trainer import make_trainer, training_arguments
from tests.recipes import tiny


def recipe(root: Path, output: Path, *more: str) -> Any:
    model, data = tiny.prepared("webnlg", root)
    return read_recipe(
        find_recipe("webnlg/inducer"), [*tiny.overrides("webnlg", model, data, output), *more]
    )


def test_only_the_new_rows_move_under_weight_decay_and_tied_heads(
    root: Path, tmp_path: Path
) -> None:
    made = recipe(root, tmp_path / "run", "training.weight_decay=0.5")
    prepared = prepare_run(made)
    model = load_base(prepared, 0)
    splice(model, prepared, planned_methods(made))
    weight = model.get_input_embeddings().weight
    assert model.lm_head.weight is weight
    before = weight.detach().clone()
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    make_trainer(model, prepared, training_arguments(made)).train()
    moved = (weight != before).any(1).nonzero().flatten().tolist()
    assert moved == sorted(prepared.new)
    assert len(moved) == 6
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)


def test_a_clipping_norm_counts_the_trained_rows_only(root: Path, tmp_path: Path) -> None:
    made = recipe(root, tmp_path / "run")
    prepared = prepare_run(made)
    model = load_base(prepared, 0)
    splice(model, prepared, planned_methods(made))
    ids = torch.arange(20)[None]
    for _ in range(2):  # gradients that add up are masked, too
        model(input_ids=ids, labels=ids).loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient.any(1).nonzero().flatten().tolist() == sorted(prepared.new)


def test_saved_rows_come_back_and_nothing_else_of_the_embedding_is_stored(
    root: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    made = recipe(root, run)
    rows = finetune.train(made, Console(quiet=True))
    prepared = prepare_run(made)
    fresh = load_base(prepared, 7)
    (name,) = embedding_names(fresh)
    start = fresh.get_input_embeddings().weight.detach().clone()
    surgery.load(fresh, run / "adapter")
    new = list(prepared.new)
    weight = fresh.get_input_embeddings().weight
    assert trained_rows(fresh) == {name: new}
    assert not torch.equal(weight[new], start[new])
    assert torch.equal(weight[: new[0]], start[: new[0]])
    size = sum(file.stat().st_size for file in (run / "adapter").glob("*.safetensors"))
    assert size < 4 * (rows[0].trainable + 2000)
    assert finetune.evaluate(run, Console(quiet=True)) == rows[0].scores


def test_rows_that_a_parameter_has_not_are_refused(root: Path, tmp_path: Path) -> None:
    model = load_base(prepare_run(recipe(root, tmp_path)), 0)
    with pytest.raises(surgery.SpliceError, match=r"rows 0 to .*asked for \[9999\]"):
        surgery.train_rows(model, "transformer.wte.weight", [9999])
    with pytest.raises(surgery.SpliceError, match=r"Did you mean 'transformer\.wte\.weight'"):
        surgery.train_rows(model, "transformer.wte.wieght", [1])
