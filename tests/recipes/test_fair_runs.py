"""What a run says that it did is what it did: gradients, rows, dtypes, and going on with it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from rich.console import Console
from typer.testing import CliRunner

import surgery
from surgery.adapter.files import read
from surgery.adapter.training import trained_rows
from surgery.cli import app
from surgery.errors import RecipeError
from surgery_recipes import finetune
from surgery_recipes.build import embedding_names, load_base, plan, splice, trainable
from surgery_recipes.prepare import prepare
from tests.recipes import tiny
from tests.recipes.test_runs import QUIET, recipe, stop_at, tensors


@pytest.mark.parametrize("name", ["sst2/lora", "webnlg/lora"])
def test_accumulated_gradients_are_those_of_one_batch(
    name: str, root: Path, tmp_path: Path
) -> None:
    """Losses and adapters of 4 x 1 and 2 x 2 agree: nothing is counted twice."""
    task, dry = name.partition("/")[0], tmp_path / "model"
    shutil.copytree(tiny.prepared(task, root)[0], dry)
    config = json.loads((dry / "config.json").read_text())
    drops = [key for key in config if "dropout" in key or key.endswith("pdrop")]
    (dry / "config.json").write_text(json.dumps({**config, **dict.fromkeys(drops, 0.0)}))
    found = []
    for size, steps in ((4, 1), (2, 2)):
        own = [f"training.per_device_train_batch_size={size}", "training.warmup_steps=0"]
        own += [f"training.gradient_accumulation_steps={steps}", f"model={dry}"]
        made = recipe(name, root, tmp_path / str(size), *own)
        made.splice[0]["dropout"] = 0.0
        made.training["train_sampling_strategy"] = "random"
        [row] = finetune.train(made, QUIET)
        found.append(([loss for _, loss in row.losses], tensors(tmp_path / str(size))))
    (one, first), (two, second) = found
    assert one == pytest.approx(two, rel=1e-3)
    for key, tensor in first.items():
        torch.testing.assert_close(tensor, second[key], rtol=1e-2, atol=2e-4)


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
    prepared = prepare(made)
    base = load_base(prepared, 0)
    splice(base, prepared, plan(made))
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
        prepared = prepare(made)
        base = load_base(prepared, 0)
        splice(base, prepared, plan(made))
        assert {p.dtype for p in base.parameters()} == {expected}
    with pytest.raises(RecipeError, match="dtype='half' must be float32 or auto"):
        recipe("webnlg/lora", root, tmp_path, "dtype=half")


def test_going_on_needs_the_same_settings(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    made = recipe("sst2/lora", root, run)
    stop_at(3, made)
    before = (run / "recipe.yaml").read_text()
    resume = finetune.Run(resume=True)
    other = recipe("sst2/lora", root, run, "training.learning_rate=0.5")
    with pytest.raises(RecipeError, match=r"had training.learning_rate=.*, the run has 0\.5"):
        finetune.train(other, QUIET, resume)
    with pytest.raises(RecipeError, match="that run had splice="):
        finetune.train(recipe("sst2/inducer", root, run), QUIET, resume)
    assert (run / "recipe.yaml").read_text() == before
    finetune.train(made, QUIET, resume)
    written = (run / "metrics.json").read_text()
    with pytest.raises(RecipeError, match=r"holds a finished run\. Score it again"):
        finetune.train(made, QUIET, resume)
    assert (run / "metrics.json").read_text() == written


@pytest.mark.parametrize("name", ["sst2/prefix", "webnlg/inducer", "coqa/fine_tuning"])
def test_a_run_that_was_stopped_while_it_was_scored_is_only_scored(
    name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    kept = ["training.save_strategy=no", "training.load_best_model_at_end=false", "patience=0"]
    kept += ["training.eval_strategy=no"]
    [expected] = finetune.train(recipe(name, root, whole, *kept), QUIET)
    made = recipe(name, root, broken, *kept)
    console = Console(record=True, file=open(os.devnull, "w"), width=300)  # noqa: SIM115
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "answers", pressed)
        with pytest.raises(KeyboardInterrupt):
            finetune.train(made, console)
    console.file.close()
    assert "training is over, --resume scores it" in console.export_text()
    with pytest.raises(RecipeError, match="holds an unfinished run"):
        finetune.train(made, QUIET)
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "make_trainer", lambda *a: pytest.fail("it trained again"))
        [row] = finetune.train(made, QUIET, finetune.Run(resume=True))
    assert row.scores == expected.scores
    assert (row.inserted, row.trainable, row.percent) == (
        expected.inserted, expected.trainable, expected.percent,
    )  # fmt: skip
    assert json.loads((broken / "metrics.json").read_text())["rows"][0]["scores"] == row.scores


def pressed(*args: Any) -> Any:
    raise KeyboardInterrupt


def test_what_an_interrupted_run_has_learnt_is_not_written_over_unasked(
    root: Path, tmp_path: Path
) -> None:
    kept = ["training.save_strategy=no", "training.load_best_model_at_end=false", "patience=0"]
    made = recipe("sst2/lora", root, tmp_path / "run", *kept, "training.eval_strategy=no")
    stop_at(3, made)
    before = tensors(tmp_path / "run")
    with pytest.raises(RecipeError, match="what an interrupted run has learnt"):
        finetune.train(made, QUIET)
    with pytest.raises(RecipeError, match="no checkpoint to go on from"):
        finetune.train(made, QUIET, finetune.Run(resume=True))
    assert all(torch.equal(t, before[n]) for n, t in tensors(tmp_path / "run").items())
    finetune.train(made, QUIET, finetune.Run(overwrite=True))


@pytest.mark.parametrize(
    ("name", "more", "part"),
    [
        ("sst2/lora", ["training.metric_for_best_model=eval_acuracy"], "Did you mean 'accuracy'"),
        ("sst2/lora", ["training.optim=adamw_bnb_8bit"], "transformers' Trainer refuses it"),
        ("sst2/lora", ["training.output_dir=x"], "checkpoints go below output=PATH"),
        ("sst2/lora", ["splice=[{method: lora, layers: 3}]"], r"layers must be \[first, last"),
        ("sst2/lora", ["splice=[{method: lora, layers: [0, 9]}]"], "of this model's layers 0 to 1"),
        ("sst2/lora", ["data.held_out=0.1"], "held_out=0.1 must be a whole number"),
        ("sst2/lora", ["data.held_out=many"], "held_out='many' must be a number"),
        ("webnlg/lora", ["baseline=true"], "no new head that could be trained alone"),
    ],
)
def test_what_cannot_be_is_said_before_a_step_is_taken(
    name: str, more: list[str], part: str, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=part):
        finetune.train(recipe(name, root, tmp_path / "run", *more), QUIET)
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_folder_that_cannot_be_written_to_is_said_first(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in ("file", "file/below"):
        with pytest.raises(RecipeError, match="file is no folder that can be written to"):
            finetune.train(recipe("sst2/lora", root, tmp_path / output), QUIET)


def test_errors_keep_their_brackets_and_lines() -> None:
    runner = CliRunner()
    shown = runner.invoke(app, ["train", "[/tmp]" + "x" * 100])
    assert shown.exit_code == 1
    assert "[/tmp]" + "x" * 100 in shown.output
    told = runner.invoke(app, ["compare", "small_nlu", "output=elsewhere"])
    assert "Use --output and --seeds" in told.output


def test_files_with_a_mark_of_their_encoding_or_without_rows(tmp_path: Path) -> None:
    from surgery_recipes.files import read_rows

    (tmp_path / "a.tsv").write_bytes(b"\xef\xbb\xbfsentence\tlabel\nfine\t1\n")
    assert read_rows(tmp_path / "a.tsv", ["sentence"]) == [{"sentence": "fine", "label": "1"}]
    (tmp_path / "b.tsv").write_text("sentence\tlabel\n")
    with pytest.raises(RecipeError, match="no rows in it"):
        read_rows(tmp_path / "b.tsv", ["sentence"])
    (tmp_path / "c.tsv.gz").write_bytes(b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03damaged")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_rows(tmp_path / "c.tsv.gz", ["sentence"])
