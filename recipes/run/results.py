"""Write the results of a run: metrics, answers, a page of samples and a plot of the loss."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table
from rich.text import Text

import surgery
from surgery import Example
from surgery_recipes.recipe_files import write_whole

SHOWN = 100
FEW = 10  # examples; the score of a quarter with fewer means nothing
STYLE = (
    "body{font:15px/1.4 sans-serif;margin:2em}table{border-collapse:collapse}"
    "td,th{border:1px solid #ccc;padding:.4em;text-align:left;vertical-align:top;"
    "white-space:pre-wrap}"
)
RIGHT = '<td style="color:#176a2c">✓ right</td>'
WRONG = '<td style="color:#9c2415">✗ wrong</td>'


@dataclass(frozen=True)
class Row:
    """The results of one trained model.

    Attributes:
        what: the names of the methods.
        score: the main score of the task.
        scores: all scores.
        inserted: the number of inserted parameters.
        percent: inserted parameters in per cent of the base's, as papers count; 100 if the whole
            model is trained.
        stored: parameters that a saved adapter holds, in per cent of the base's.
        trainable: the numbers that training could change: inserted ones, the head, rows of new
            tokens.
        seconds: how long training took.
        peak_mib: the peak of GPU memory in training; without a GPU, of the memory of the process.
        losses: pairs of a step and its training loss.
        validation: pairs of a step and the loss of the validation set, if there are validations.
        by_length: pairs of a mean input length in tokens and a score, one for each quarter of the
            scored examples, from the shortest inputs to the longest.
    """

    what: str
    score: float
    scores: dict[str, float]
    inserted: int
    percent: float
    stored: float
    trainable: int
    seconds: float
    peak_mib: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    by_length: list[tuple[float, float]] = field(default_factory=list)


def table(rows: Sequence[Row], metric: str) -> Table:
    """The table that is printed at the end of a run."""
    made = Table(title=Text(f"{metric} on what was held out"))
    for heading in ("", metric, "trainable", "inserted", "of the base", "training"):
        made.add_column(Text(heading), justify="right" if heading else "left")
    for row in rows:
        numbers = (f"{row.score:.4f}", f"{row.trainable:,}", f"{row.inserted:,}")
        made.add_row(Text(row.what), *numbers, f"{row.percent:.2f} %", f"{row.seconds:.0f} s")
    return made


def by_length(
    task: surgery.Task, tokenizer: Any, examples: Sequence[Example], answers: Sequence[Any]
) -> list[tuple[float, float]]:
    """The main score of each quarter of input lengths; empty for fewer than 40 examples."""
    if len(examples) < 4 * FEW:
        return []
    lengths = [len(task.prompt(example, tokenizer)["input_ids"]) for example in examples]
    order = sorted(range(len(examples)), key=lengths.__getitem__)
    found = []
    for quarter in range(4):
        part = order[quarter * len(order) // 4 : (quarter + 1) * len(order) // 4]
        score = task.main_score([answers[i] for i in part], [examples[i] for i in part])
        found.append((sum(lengths[i] for i in part) / len(part), score))
    return found


def write(folder: Path, rows: Sequence[Row], task: surgery.Task, seed: int) -> None:
    """Write ``loss.png``, then ``metrics.json``, whose presence marks the run as finished."""
    _plot(folder, rows, task.metric)
    content = {
        "metric": task.metric,
        "rows": [dataclasses.asdict(row) for row in rows],
        "notes": task.notes(),
        "seed": seed,
        "machine": _machine(),
        "versions": {
            "torch": str(torch.__version__), "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }  # fmt: skip
    write_whole(folder / "metrics.json", json.dumps(_without_nan(content), indent=1))


def _without_nan(x: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by null."""
    if isinstance(x, dict):
        return {key: _without_nan(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_without_nan(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def peak_mib() -> float:
    """The peak of GPU memory so far; without a GPU, that of this process with its libraries."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # not on Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, threads: {torch.get_num_threads()}"


def write_answers(
    folder: Path, task: surgery.Task, sets: dict[str, tuple[Sequence[Example], Sequence[Any]]]
) -> None:
    """Write ``answers.jsonl`` with every answer, and ``samples.html`` with 100 of each split."""
    lines = []
    cells = []
    marked = bool(task.labels)  # of a text, only a score says how right it is
    for name, (examples, answers) in sets.items():
        texts = [task.labels[a] if isinstance(a, int) else a for a in answers]
        lines += [
            json.dumps({"set": name, "answer": text, "references": task.references(example)})
            for text, example in zip(texts, examples, strict=True)
        ]
        step = max(1, len(texts) // SHOWN)
        for text, example in list(zip(texts, examples, strict=True))[::step][:SHOWN]:
            wanted = task.references(example)
            row = (name, task.source(example), "\n".join(wanted), text)
            cell = "".join(f"<td>{html.escape(str(part))}</td>" for part in row)
            cells.append(cell + (RIGHT if text in wanted else WRONG) * marked)
    titles = ("set", "input", "references", "output", *["right"] * marked)
    head = "".join(f"<th>{title}</th>" for title in titles)
    body = "\n".join(f"<tr>{cell}</tr>" for cell in cells)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{task.name}</title>'
        f"<style>{STYLE}</style><h1>{task.name}</h1><table><tr>{head}</tr>\n{body}</table></html>\n"
    )
    (folder / "answers.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "samples.html").write_text(page)


def _columns(points: Sequence[tuple[int, float]]) -> tuple[Sequence[float], Sequence[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _plot(folder: Path, rows: Sequence[Row], metric: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for row in rows:
        label = f"{row.what} ({metric} {row.score:.3f})"
        (drawn,) = axes.plot(*_columns(row.losses), marker=".", markersize=4, label=label)
        if row.validation:
            steps, values = _columns(row.validation)
            axes.plot(steps, values, "o--", color=drawn.get_color(), label="its validation loss")
    axes.set(xlabel="step", ylabel="loss, nats for each example or token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(folder / "loss.png", dpi=140)
    plt.close(figure)
