"""Sentence classification: two classes, by a number beside each sentence of a TSV file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import surgery
from surgery import Example, RecipeError
from surgery_recipes.tasks.classification import Classification, labelled
from surgery_recipes.tasks.data_files import read_rows

BUNDLED = Path(__file__).parents[1] / "data"


@dataclass(frozen=True)
class SentenceClassification(Classification):
    """Two classes, by whether the number beside a sentence exceeds a threshold.

    Attributes:
        path: a TSV file with a header, gzipped or not, with a column ``split`` (train or test).
            ``package:NAME`` is a file of ``recipes/data``.
        text: the column of the sentence.
        label: the column of the number.
        positive_above: the label is 1 where the number is greater.
    """

    name: ClassVar[str] = "sentence_classification"

    text: str = "text"
    label: str = "label"
    positive_above: float = 0.5
    max_length: int = 128

    @property
    def labels(self) -> tuple[str, ...]:
        return ("negative", "positive")

    def splits(self) -> dict[str, list[Example]]:
        bundled = self.path.startswith("package:")
        file = BUNDLED / self.path.removeprefix("package:") if bundled else Path(self.path)
        splits: dict[str, list[Example]] = {"train": [], "test": []}
        for number, row in enumerate(read_rows(file, ("split", self.text, self.label))):
            where = f"{file}: row {number + 1}"
            if row["split"] not in splits:
                raise RecipeError(f"{where}: split {row['split']!r} is neither train nor test.")
            try:
                value = float(row[self.label])
            except ValueError as error:
                raise RecipeError(f"{where}: column {self.label!r}: {error}.") from error
            example = labelled([row[self.text]], int(value > self.positive_above), where)
            splits[row["split"]].append(example)
        for name, examples in splits.items():
            if not examples:
                raise RecipeError(f"{file}: no rows with split {name!r}. Add some to the file.")
        return splits


@surgery.hookimpl
def register_tasks(register: surgery.RegisterTask) -> None:
    register(SentenceClassification)
