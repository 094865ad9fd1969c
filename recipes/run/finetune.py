"""Train the model of a recipe, score it, and score a finished run again.

    Recipe -> planned_methods, training_arguments    its methods and arguments, checked
           -> prepare_run   -> Prepared              its data, checked against the model
           -> load_base, splice, try_out             the model, on the longest examples
           -> make_trainer, train                    checkpoints, then the adapter
           -> answers, task.score -> Row             metrics, answers, samples, plot

Whatever can fail fails before the first step, and before anything is written.

The run folder holds ``recipe.yaml`` (complete, extending nothing), ``adapter/`` (or ``model/`` if
the whole model was trained), ``metrics.json``, ``resampled.json``, ``loss.png``, ``answers.jsonl``,
``samples.html`` and ``checkpoints/``. Under ``torchrun`` or ``accelerate launch`` every process
trains, and the first one writes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from transformers import TrainingArguments, set_seed

import surgery
from surgery import RecipeError, StoreError, restore
from surgery_recipes.recipe_files import Recipe
from surgery_recipes.run import results
from surgery_recipes.run.answers import answers
from surgery_recipes.run.build import (
    fits_to_data,
    freeze_all_but_head,
    load_base,
    loss_of_longest,
    planned_methods,
    splice,
    trainable,
    try_out,
)
from surgery_recipes.run.checkpoints import drop_newer, whole_checkpoints
from surgery_recipes.run.kinds import of_images
from surgery_recipes.run.loaded import load_trained
from surgery_recipes.run.prepare import Prepared, main_score, prepare_run
from surgery_recipes.run.resampling import resampled, write_resampled
from surgery_recipes.run.results import Row
from surgery_recipes.run.run_folder import (
    RunOptions,
    check_folder,
    read_trained,
    recipe_of_run,
    start_folder,
    write_trained,
)
from surgery_recipes.run.trainer import make_trainer, training_arguments

HEAD_ALONE = "frozen base, new head"


def train(recipe: Recipe, console: Console, run: RunOptions | None = None) -> list[Row]:
    """Train and score the model of a recipe, and its baseline; write the run folder.

    Returns:
        The results: the baseline's, if the recipe has one, and those of the model.

    Raises:
        SurgeryError: the recipe, its data or the folder will not do. Nothing has been written.
    """
    run = run or RunOptions()
    methods = planned_methods(recipe)
    made = training_arguments(recipe, run.wandb)
    folder = Path(recipe.output)
    check_folder(folder, recipe, run)
    prepared = prepare_run(recipe, run.trust)
    trained = read_trained(folder) if run.resume else None
    checkpoint = None
    if trained is None:
        model = load_base(prepared, made.seed)
        splice(model, prepared, methods)
        try_out(model, prepared)
        checkpoint = _last_checkpoint(model, folder) if run.resume else None
    else:
        model = load_trained(prepared, made, folder)
    first = made.process_index == 0
    if not first:
        console = Console(quiet=True)
    else:
        start_folder(folder, recipe, run)
        if trained is None:
            drop_newer(folder, checkpoint)
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in prepared.examples.items())
    console.print(Text(f"{recipe.model}: {sizes}"))
    rows = []
    if recipe.baseline:
        console.rule(HEAD_ALONE)
        rows.append(_baseline(prepared, made, console))
    what = " + ".join(entry["method"] for entry in recipe.splice) or "fine-tuning"
    if recipe.frozen:
        what = HEAD_ALONE if trainable(model) else "untouched base"
    console.rule(Text(what))
    if methods:
        console.print(surgery.summary(model), highlight=False)
    if trained is None:
        trained = _fit(what, model, prepared, made, console, checkpoint, folder)
    rows.append(_score(trained, model, prepared, made, console, folder))
    if first:
        results.write(folder, rows, prepared.task, made.seed)
    console.print(results.table(rows, prepared.task.metric))
    for name, note in prepared.task.notes().items():
        console.print(Text(f"{name}: {note}"))
    last = rows[-1]
    shown = ", ".join(f"{name} {value:.4f}" for name, value in last.scores.items())
    console.print(Text(f"{what}: {shown}; {last.seconds:.0f} s; results in {folder}"))
    console.print(Text(f"score it again with: surgery eval {folder}"))
    return rows


def _last_checkpoint(model: Any, folder: Path) -> Path:
    """The newest checkpoint that can be resumed from.

    Raises:
        RecipeError: no checkpoint is whole.
    """
    why = ""
    for checkpoint in whole_checkpoints(folder):
        try:
            if surgery.summary(model).reports:
                restore(model, checkpoint)  # checks digests; the trainer restores it again
            return checkpoint
        except StoreError as error:
            why = f" {error}"
    raise RecipeError(f"--resume: {folder} has no whole checkpoint.{why} Start with --overwrite.")


def dry_run(recipe: Recipe, console: Console, trust: bool = False) -> float:
    """Build everything and run the longest examples once, without training; return the loss."""
    methods = planned_methods(recipe)
    made = training_arguments(recipe)
    prepared = prepare_run(recipe, trust)
    model = load_base(prepared, made.seed)
    splice(model, prepared, methods)
    loss = try_out(model, prepared)
    for name, split in prepared.examples.items():
        console.print(Text(f"{name}: {len(split):,} examples"))
    if methods:
        console.print(surgery.summary(model), highlight=False)
    console.print(f"trainable: {trainable(model):,}; loss of the longest examples: {loss:.3f}")
    return loss


def evaluate(
    folder: Path, console: Console, trust: bool = False, overrides: Sequence[str] = ()
) -> dict[str, float]:
    """Score a finished run again, from its files and a freshly loaded base.

    Args:
        overrides: see :func:`recipe_of_run`.
    """
    recipe = recipe_of_run(folder, overrides)
    prepared = prepare_run(recipe, trust)
    made = training_arguments(recipe)
    model = load_trained(prepared, made, folder)
    _, scores = _answer(model, prepared, made, console)
    for name, value in scores.items():
        console.print(Text(f"{folder}: {name} {value}"))
    return scores


def _baseline(prepared: Prepared, made: TrainingArguments, console: Console) -> Row:
    model = load_base(prepared, made.seed)
    freeze_all_but_head(model)
    trained = _fit(HEAD_ALONE, model, prepared, made, console, None, None)
    return _score(trained, model, prepared, made, console, None)


def _fit(
    what: str,
    model: Any,
    prepared: Prepared,
    made: TrainingArguments,
    console: Console,
    checkpoint: Path | None,
    folder: Path | None,
) -> dict[str, Any]:
    """Train one model, save it in ``folder`` unless that is None, and return its numbers."""
    set_seed(made.seed)
    trainer = make_trainer(model, prepared, made)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if checkpoint is None and fits_to_data(model):
        surgery.fit(model, trainer.get_train_dataloader())
        set_seed(made.seed)
    learns = trainable(model) > 0
    try:
        if learns:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        if folder is not None and made.process_index == 0:
            where = _keep(model, prepared, folder)
            step = trainer.state.global_step
            console.print(Text(f"\ninterrupted at step {step}: what was learnt is in {where}"))
        raise
    counts = surgery.summary(model)
    whole = all(p.requires_grad for p in model.parameters())
    trained = {
        "what": what,
        "inserted": counts.inserted,
        "percent": 100.0 if whole else counts.percent,
        "stored": 100.0 if whole else 100 * counts.stored / counts.base,
        "trainable": trainable(model),
        "seconds": trainer.seconds if learns else 0.0,
        "peak_mib": results.peak_mib(),
        "losses": _logged(trainer, "loss"),
        "validation": _logged(trainer, "eval_loss"),
    }
    if folder is not None and made.process_index == 0:
        if learns:
            _keep(model, prepared, folder)
        write_trained(folder, trained)
    return trained


def _logged(trainer: Any, name: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]


def _score(
    trained: dict[str, Any],
    model: Any,
    prepared: Prepared,
    made: TrainingArguments,
    console: Console,
    folder: Path | None,
) -> Row:
    """Score one model, and write its answers into ``folder`` unless that is None."""
    try:
        sets, scores = _answer(model, prepared, made, console)
    except KeyboardInterrupt:
        if folder is not None:
            said = f"\ninterrupted: training is over, --resume scores it; see {folder}"
            console.print(Text(said))
        raise
    if prepared.recipe.validate_only and not math.isfinite(loss_of_longest(model, prepared)):
        scores = dict.fromkeys(scores, math.nan)  # argmax of NaN is a class like any other
    if folder is not None and made.process_index == 0:
        results.write_answers(folder, prepared.task, sets)
        with console.status("scoring resamples of the examples"):
            write_resampled(folder, _resampled(prepared.task, sets))
    scored = [pair for name in prepared.scored for pair in zip(*sets[name], strict=True)]
    examples, given = map(list, zip(*scored, strict=True))
    lengths = [] if of_images(prepared.task) else examples  # images have none
    return Row(
        **trained,
        score=scores[main_score(prepared.recipe, scores)],
        scores=scores,
        by_length=results.by_length(prepared.task, prepared.tokenizer, lengths, given),
    )


def _resampled(task: surgery.Task, sets: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The scores of resamples of each scored split."""
    found: dict[str, dict[str, Any]] = {}
    for examples, given in sets.values():
        found |= resampled(task, given, examples)
    return found


def _keep(model: Any, prepared: Prepared, folder: Path) -> Path:
    """Save the adapter, or the model if it was trained as a whole; return the folder."""
    if surgery.summary(model).reports:
        prepared.tokenizer.save_pretrained(folder / "adapter")
        return surgery.save(model, folder / "adapter")
    model.save_pretrained(folder / "model")
    prepared.tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def _answer(
    model: Any, prepared: Prepared, made: TrainingArguments, console: Console
) -> tuple[dict[str, Any], dict[str, float]]:
    """The examples and answers of every scored split, and the scores."""
    sets = {}
    scores: dict[str, float] = {}
    task, size = prepared.task, made.per_device_eval_batch_size
    for name in prepared.scored:
        examples = prepared.examples[name]
        given = answers(model, task, prepared.tokenizer, examples, size, console)
        sets[name] = (examples, given)
        scores |= task.score(given, examples)
    return sets, scores
