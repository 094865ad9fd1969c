"""MNLI: does a premise entail a hypothesis, contradict it, or neither? (Williams et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import surgery
from surgery import Example, RecipeError
from surgery_recipes.files import data_folder, find_file, read_hub, read_rows, require_columns
from surgery_recipes.tasks.classification import Classification, labelled

LABELS = ("entailment", "neutral", "contradiction")
NAMES = {  # of columns: the corpus' own and GLUE's, beside the hub's
    "premise": ("premise", "sentence1"),
    "hypothesis": ("hypothesis", "sentence2"),
    "label": ("label", "gold_label"),
}
HUB = "nyu-mll/multi_nli"
SETS = {"matched": "validation_matched", "mismatched": "validation_mismatched"}
STEMS = {"matched": "dev_matched", "mismatched": "dev_mismatched", "train": "train"}


@dataclass(frozen=True)
class MNLI(Classification):
    """Pairs of sentences; the matched and the mismatched development set are scored apart.

    Attributes:
        path: a folder with ``train*``, ``dev_matched*`` and ``dev_mismatched*`` (``.jsonl`` or
            ``.tsv``; the corpus' names of files and columns, or GLUE's); without it ``mnli``
            below $SURGERY_DATA, else ``nyu-mll/multi_nli`` from the hub.
        validation: so many of the first matched examples choose the epoch; they are scored, too.
        mismatched_if: take only the mismatched rows in which this column is true. For partial
            files that say which of their rows are a fair sample.
    """

    name: ClassVar[str] = "mnli"
    metric: ClassVar[str] = "accuracy_mismatched"

    validation: int = 1600
    mismatched_if: str = ""

    @property
    def labels(self) -> tuple[str, ...]:
        return LABELS

    def splits(self) -> dict[str, list[Example]]:
        sets = {name: self._read(name) for name in ("train", "matched", "mismatched")}
        if not 0 < self.validation <= len(sets["matched"]):
            raise RecipeError(
                f"task 'mnli': validation={self.validation} is not possible: "
                f"there are {len(sets['matched'])} matched examples."
            )
        return {
            "train": sets["train"],
            "validation": sets["matched"][: self.validation],
            "dev": [*sets["matched"], *sets["mismatched"]],
        }

    def score(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, float]:
        scores = {}
        for name in SETS:
            chosen = [
                a == e["label"] for a, e in zip(answers, examples, strict=True) if e["set"] == name
            ]
            if chosen:
                scores[f"accuracy_{name}"] = sum(chosen) / len(chosen)
        return scores

    def _read(self, name: str) -> list[Example]:
        folder = data_folder(self.path, "mnli")
        if folder is None:
            where, rows = HUB, read_hub(HUB, SETS.get(name, "train"))
        else:
            stem = STEMS[name]
            file = find_file(folder, (stem, f"multinli_1.0_{stem}"))
            where, rows = str(file), read_rows(file, ())
        if name == "mismatched" and self.mismatched_if and rows:
            require_columns(list(rows[0]), [self.mismatched_if], where)
            rows = [row for row in rows if row.get(self.mismatched_if) in (True, "true", "1")]
        found = [_example(row, name, f"{where}: row {i + 1}") for i, row in enumerate(rows)]
        kept = [example for example in found if example]
        if not kept:
            raise RecipeError(f"{where}: no labelled pair of sentences.")
        return kept


def _example(row: dict[str, Any], name: str, where: str) -> Example:
    values = {}
    for key, names in NAMES.items():
        present = [n for n in names if row.get(n) is not None]
        if not present:
            columns = ", ".join(map(str, row))
            raise RecipeError(f"{where}: no column {' or '.join(names)}. Columns: {columns}.")
        values[key] = row[present[0]]
    label = values["label"]
    if label in ("-", -1):  # the corpus' mark of pairs on which its annotators did not agree
        return {}
    number = LABELS.index(label) if label in LABELS else label
    if str(number) not in ("0", "1", "2"):
        raise RecipeError(f"{where}: label {label!r} is none of {', '.join(LABELS)}.")
    pair = labelled([values["premise"], values["hypothesis"]], int(number), where)
    return {**pair, "set": name}


@surgery.hookimpl
def register_tasks(register: surgery.RegisterTask) -> None:
    register(MNLI)
