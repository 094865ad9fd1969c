"""Finetune: run a recipe with transformers' Trainer, score it, and keep what is worth keeping.

The run folder holds ``recipe.yaml`` (all resolved), ``adapter/`` (or ``model/``, where everything
was trained), ``metrics.json``, ``loss.png``, ``answers.jsonl``, ``samples.html`` and checkpoints.
Under ``torchrun`` or ``accelerate launch`` every process trains and the first one writes.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from surgery_recipes import results
from surgery_recipes.answers import answers
from surgery_recipes.build import (
    freeze_all_but_head,
    load_base,
    plan,
    splice,
    trainable,
    try_out,
)
from surgery_recipes.prepare import Prepared, prepare
from surgery_recipes.results import Row
from surgery_recipes.trainer import CHECKPOINTS, arguments, make_trainer
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import surgery
from surgery import RecipeError
from surgery.recipe import Recipe, read_recipe, write_recipe


@dataclass(frozen=True)
class Run:
    """How to run: go on with an unfinished run, write over a finished one, log to W&B."""

    resume: bool = False
    overwrite: bool = False
    wandb: bool = False


def train(recipe: Recipe, console: Console, run: Run | None = None) -> list[Row]:
    """Train what a recipe says, and its baseline; write the run folder; print the table."""
    run = run or Run()
    methods = plan(recipe)
    made = arguments(recipe, run.wandb)
    folder = Path(recipe.output)
    checkpoint = _checkpoint(folder, run)
    prepared = prepare(recipe)
    model = load_base(prepared, made.seed)
    splice(model, prepared, methods)
    try_out(model, prepared)
    first = made.process_index == 0
    if not first:
        console = Console(quiet=True)
    else:
        _start_folder(folder, recipe, run)
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in prepared.examples.items())
    console.print(f"{recipe.model}: {sizes}", highlight=False)
    rows = []
    if recipe.baseline:
        console.rule("frozen base, new head")
        rows.append(_baseline(prepared, made, console))
    what = " + ".join(entry["method"] for entry in recipe.splice) or "fine-tuning"
    console.rule(what)
    if methods:
        console.print(surgery.summary(model), highlight=False)
    rows.append(_fit(what, model, prepared, made, console, checkpoint, folder))
    if first:
        results.write(folder, rows, prepared.task, made.seed)
    console.print(results.table(rows, prepared.task.metric))
    for name, note in prepared.task.notes().items():
        console.print(f"{name}: {note}", highlight=False)
    last = rows[-1]
    shown = ", ".join(f"{name} {value:.4f}" for name, value in last.scores.items())
    console.print(f"{what}: {shown}; {last.seconds:.0f} s; all of it in {folder}", highlight=False)
    console.print(f"score it again with: surgery eval {folder}", highlight=False)
    return rows


def dry_run(recipe: Recipe, console: Console) -> float:
    """Build everything and run one batch, without training and without writing; the loss."""
    methods = plan(recipe)
    made = arguments(recipe)
    prepared = prepare(recipe)
    model = load_base(prepared, made.seed)
    splice(model, prepared, methods)
    loss = try_out(model, prepared)
    for name, split in prepared.examples.items():
        console.print(f"{name}: {len(split):,} examples", highlight=False)
    if methods:
        console.print(surgery.summary(model), highlight=False)
    console.print(f"trainable: {trainable(model):,}; loss of the longest examples: {loss:.3f}")
    return loss


def evaluate(folder: Path, console: Console) -> dict[str, float]:
    """Load the base afresh, splice the saved adapter in, and score it."""
    recipe = read_recipe(folder / "recipe.yaml")
    prepared = prepare(recipe)
    made = arguments(recipe)
    if recipe.splice:
        model = surgery.load(load_base(prepared, made.seed), folder / "adapter")
    else:
        model = load_base(prepared, made.seed, str(folder / "model"))
    model.to(made.device)
    _, scores = _answer(model, prepared, made, console)
    for name, value in scores.items():
        console.print(f"{folder}: {name} {value}")
    return scores


def _checkpoint(folder: Path, run: Run) -> str | None:
    """Where to go on from, if anywhere."""
    checkpoints = folder / CHECKPOINTS
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    if run.resume:
        if last is None:
            raise RecipeError(f"--resume: {checkpoints} has no checkpoint. Run without --resume.")
        return last
    if not run.overwrite and (folder / "metrics.json").is_file():
        raise RecipeError(
            f"{folder} holds the results of a finished run. Choose another folder with "
            "output=PATH, or write over it with --overwrite."
        )
    if not run.overwrite and last is not None:
        raise RecipeError(
            f"{folder} holds an unfinished run. Go on with --resume, begin again with "
            "--overwrite, or choose another folder with output=PATH."
        )
    return None


def _start_folder(folder: Path, recipe: Recipe, run: Run) -> None:
    if run.overwrite and folder.is_dir():
        for old in (folder / CHECKPOINTS, folder / "adapter", folder / "model"):
            shutil.rmtree(old, ignore_errors=True)
        (folder / "metrics.json").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_recipe(recipe, folder / "recipe.yaml")


def _baseline(prepared: Prepared, made: TrainingArguments, console: Console) -> Row:
    model = load_base(prepared, made.seed)
    freeze_all_but_head(model)
    return _fit("frozen base, new head", model, prepared, made, console, None, None)


def _fit(
    what: str,
    model: Any,
    prepared: Prepared,
    made: TrainingArguments,
    console: Console,
    checkpoint: str | None,
    folder: Path | None,
) -> Row:
    """Train and score one model; save it in ``folder``, if it is one to keep."""
    set_seed(made.seed)
    trainer = make_trainer(model, prepared, made)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        if folder is not None and made.process_index == 0:
            where = _keep(model, prepared, folder)
            step = trainer.state.global_step
            console.print(f"\ninterrupted at step {step}: what was learnt is in {where}")
        raise
    seconds = trainer.seconds
    peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    if folder is not None and made.process_index == 0:
        _keep(model, prepared, folder)
    sets, scores = _answer(model, prepared, made, console)
    if folder is not None and made.process_index == 0:
        results.write_answers(folder, prepared.task, sets)
    counts = surgery.summary(model)
    whole = all(p.requires_grad for p in model.parameters())
    scored = [pair for name in prepared.scored for pair in zip(*sets[name], strict=True)]
    examples, given = map(list, zip(*scored, strict=True))
    return Row(
        what=what,
        score=scores[prepared.task.metric],
        scores=scores,
        inserted=counts.inserted,
        percent=100.0 if whole else counts.percent,
        stored=100.0 if whole else 100 * counts.stored / counts.base,
        trainable=trainable(model),
        seconds=seconds,
        peak_mib=peak,
        losses=[(e["step"], e["loss"]) for e in trainer.state.log_history if "loss" in e],
        by_length=results.by_length(prepared.task, prepared.tokenizer, examples, given),
    )


def _keep(model: Any, prepared: Prepared, folder: Path) -> Path:
    """Save what was trained."""
    if surgery.summary(model).reports:
        return surgery.save(model, folder / "adapter")
    model.save_pretrained(folder / "model")
    prepared.tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def _answer(
    model: Any, prepared: Prepared, made: TrainingArguments, console: Console
) -> tuple[dict[str, Any], dict[str, float]]:
    """Answers to every set that is scored, and their scores."""
    sets = {}
    scores: dict[str, float] = {}
    task, size = prepared.task, made.per_device_eval_batch_size
    for name in prepared.scored:
        examples = prepared.examples[name]
        given = answers(model, task, prepared.tokenizer, examples, size, console)
        sets[name] = (examples, given)
        scores |= task.score(given, examples)
    return sets, scores
