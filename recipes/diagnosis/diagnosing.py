"""Diagnose finished runs: one folder of tables and pictures, and a few lines to read.

RUN/diagnosis/
  mass.csv, .png         attention to virtual keys by layer and head, and by position, at the
                         start and at the end of training
  updates.csv, .png      how far each inserted module moved, and the rank of its update
  lengths.csv, .png      the score against the length of the input, with 95 % bands
  losses.csv, .png       the first 200 steps of all runs that are given
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from surgery import RecipeError
from surgery_recipes.diagnosis import pictures
from surgery_recipes.diagnosis.lengths import Bin, by_length
from surgery_recipes.diagnosis.updates import Update, updates
from surgery_recipes.diagnosis.virtual_mass import Mass, virtual_mass
from surgery_recipes.run import Collator, LoadedRun, load_run, of_images, pad_id

FIRST = 200  # steps whose loss is drawn


def diagnose(
    folders: Sequence[Path],
    console: Console,
    examples: int = 128,
    minus: Path | None = None,
    trust: bool = False,
) -> Path:
    """Diagnose a finished run, and draw the losses of others beside its own.

    Args:
        folders: the run, and others to compare the first losses with.
        examples: how many scored examples attention is measured on.
        minus: a run on the same examples whose score is subtracted, such as fine-tuning's.
        trust: whether the package of ``model: package:NAME`` may be imported, whatever it is.

    Returns:
        The folder that holds the files.

    Raises:
        RecipeError: a folder holds no finished run, or the runs answered other examples.
    """
    run = load_run(folders[0], (), trust)
    losses = {_name(folder, folders): _losses(folder) for folder in folders}
    lengths = _lengths(run, minus, trust)
    folder = folders[0] / "diagnosis"
    folder.mkdir(exist_ok=True)
    with console.status("measuring the model as it began and as it ended"):
        batches = _batches(run, examples)
        start = run.start()
        before, loss_before = virtual_mass(start, batches), _loss(run, start, examples)
        end = run.end()
        after, loss_after = virtual_mass(end, batches), _loss(run, end, examples)
        moved = updates(start, end)
    _write_mass(folder, before, after)
    _write(folder / "updates.csv", ["module", "port", "moved", "norm", "effective_rank"],
           [[u.module, u.port, u.moved, u.norm, u.rank] for u in moved])  # fmt: skip
    _write(folder / "lengths.csv", ["set", "tokens", "examples", "score", "low", "high"],
           [[name, *vars(b).values()] for name, bins in lengths.items() for b in bins])  # fmt: skip
    _write(folder / "losses.csv", ["run", "step", "loss"],
           [[name, *pair] for name, pairs in losses.items() for pair in pairs])  # fmt: skip
    pictures.write(folder, before, after, moved, lengths, losses, run.prepared.task.metric)
    console.print(_summary(before, after, moved, loss_before, loss_after))
    console.print(Text(f"tables and pictures: {folder}"))
    return folder


def _name(folder: Path, folders: Sequence[Path]) -> str:
    """The part of a run's path that tells it from the others."""
    return "/".join(folder.parts[-3:]) if len(folders) > 1 else folder.name


def _losses(folder: Path) -> list[tuple[int, float]]:
    try:
        last = json.loads((folder / "metrics.json").read_bytes())["rows"][-1]
        return [(step, loss) for step, loss in last["losses"] if step <= FIRST and loss is not None]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RecipeError(
            f"{folder}: no finished run here. Give the output folder of one."
        ) from error


def _batches(run: LoadedRun, count: int, size: int = 8) -> list[dict[str, torch.Tensor]]:
    """The first scored examples as the model is asked them, padded on the right."""
    prepared = run.prepared
    asked = [e for name in prepared.scored for e in prepared.examples[name]][:count]
    prompts = [prepared.task.prompt(example, prepared.tokenizer) for example in asked]
    collate = Collator(pad_id(prepared.tokenizer))
    return [
        {name: x.to(run.arguments.device) for name, x in collate(prompts[i : i + size]).items()}
        for i in range(0, len(prompts), size)
    ]


@torch.no_grad()
def _loss(run: LoadedRun, model: Any, count: int, size: int = 8) -> float:
    """The mean training loss of the first training examples."""
    features = run.prepared.features["train"][:count]
    collate, found = Collator(pad_id(run.prepared.tokenizer)), []
    for i in range(0, len(features), size):
        batch = collate(features[i : i + size])
        batch = {name: x.to(run.arguments.device) for name, x in batch.items()}
        found += [float(model(**batch).loss)] * len(features[i : i + size])
    return sum(found) / len(found)


def _lengths(run: LoadedRun, minus: Path | None, trust: bool) -> dict[str, list[Bin]]:
    own = run.answers()
    other = load_run(minus, (), trust).answers() if minus else {}
    task, tokenizer = run.prepared.task, run.prepared.tokenizer
    found = {}
    for name, answers in own.items():
        examples = run.prepared.examples[name]
        if minus and len(other.get(name, [])) != len(answers):
            raise RecipeError(f"{minus} did not answer the {len(answers)} examples of {name!r}.")
        if of_images(task):  # they have no length
            continue
        sizes = [len(task.prompt(example, tokenizer)["input_ids"]) for example in examples]
        found[name] = by_length(task, sizes, answers, examples, other.get(name))
    return found


def _write_mass(folder: Path, before: Sequence[Mass], after: Sequence[Mass]) -> None:
    rows = [
        [mass.module, when, what, i, value]
        for when, masses in (("start", before), ("end", after))
        for mass in masses
        for what, values in (("head", mass.by_head), ("tenth", mass.by_position))
        for i, value in enumerate(values)
    ]
    _write(folder / "mass.csv", ["module", "when", "by", "number", "mass"], rows)


def _write(path: Path, head: list[str], rows: list[list[Any]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])


def _summary(
    before: Sequence[Mass],
    after: Sequence[Mass],
    moved: Sequence[Update],
    loss_before: float,
    loss_after: float,
) -> Table:
    table = Table("", "start", "end")
    table.add_row("training loss, first examples", f"{loss_before:.3f}", f"{loss_after:.3f}")
    if after:
        table.add_row("attention to virtual keys", _mean(before), _mean(after))
    ranks = [u.rank for u in moved if u.rank is not None]
    if ranks:
        table.add_row("effective rank of updates, mean", "", f"{sum(ranks) / len(ranks):.2f}")
    if moved:
        far = max(moved, key=lambda u: u.moved)
        table.add_row("moved farthest", "", Text(f"{far.module}: {far.moved:.3g}"))
    return table


def _mean(masses: Sequence[Mass]) -> str:
    values = [x for mass in masses for x in mass.by_head if not math.isnan(x)]
    return f"{sum(values) / len(values):.3f}" if values else ""
