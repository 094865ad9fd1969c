"""MNLI: tell whether a premise entails or contradicts a hypothesis (Williams et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import surgery
from surgery import Example, RecipeError
from surgery_recipes.tasks.classification import Classification, labelled
from surgery_recipes.tasks.data_files import (
    data_folder,
    find_file,
    read_hub,
    read_rows,
    require_columns,
)

LABELS = ("entailment", "neutral", "contradiction")
NAMES = {  # of the columns on the hub, and in the files of the corpus and of GLUE
    "premise": ("premise", "sentence1"),
    "hypothesis": ("hypothesis", "sentence2"),
    "label": ("label", "gold_label"),
}
HUB = "nyu-mll/multi_nli"
SETS = {"matched": "validation_matched", "mismatched": "validation_mismatched"}
STEMS = {"matched": "dev_matched", "mismatched": "dev_mismatched", "train": "train"}


@dataclass(frozen=True)
class MNLI(Classification):
    """Pairs of sentences. The matched and the mismatched development set are scored separately.

    Attributes:
        path: a folder with ``train*``, ``dev_matched*`` and ``dev_mismatched*`` (``.jsonl`` or
            ``.tsv``), with the names of files and columns of the corpus or of GLUE. Without a path
            the data are ``mnli`` below $SURGERY_DATA, or else ``nyu-mll/multi_nli`` of the hub.
        validation: how many of the matched examples, from the first on, choose the epoch. They are
            scored too.
        mismatched_if: a column; only mismatched rows in which it is true are taken. Partial files
            have one that marks an unbiased sample.
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
                f"task 'mnli': validation={self.validation} is not possible with "
                f"{len(sets['matched'])} matched examples. Take 1 to {len(sets['matched'])}."
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
            raise RecipeError(f"{where}: no pair of sentences with a gold label.")
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
    if label in ("-", -1):  # the annotators did not agree on this pair
        return {}
    number = LABELS.index(label) if label in LABELS else label
    if str(number) not in ("0", "1", "2"):
        raise RecipeError(f"{where}: label {label!r} is not one of {', '.join(LABELS)}.")
    pair = labelled([values["premise"], values["hypothesis"]], int(number), where)
    return {**pair, "set": name}


@surgery.hookimpl
def register_tasks(register: surgery.RegisterTask) -> None:
    register(MNLI)
