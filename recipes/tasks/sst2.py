"""SST-2: tell positive from negative phrases of film reviews (Socher et al. 2013, GLUE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import surgery
from surgery import Example, RecipeError
from surgery_recipes.tasks.classification import Classification, hold_out, labelled
from surgery_recipes.tasks.data_files import data_folder, find_file, read_hub, read_rows

COLUMNS = ("sentence", "label")


@dataclass(frozen=True)
class SST2(Classification):
    """GLUE's SST-2. The development set is scored, because GLUE's test set has no labels.

    Attributes:
        path: a folder with ``train*.tsv`` and ``dev*.tsv`` (columns sentence, label). Without a
            path the data are ``sst2`` below $SURGERY_DATA, or else ``stanfordnlp/sst2`` of the hub.
        held_out: the number of training examples that are held out to choose the epoch.
    """

    name: ClassVar[str] = "sst2"

    held_out: int = 1000

    @property
    def labels(self) -> tuple[str, ...]:
        return ("negative", "positive")

    def splits(self) -> dict[str, list[Example]]:
        train, validation = hold_out(self._read("train", ("train",)), self.held_out, "sst2 train")
        test = self._read("validation", ("dev", "validation"))
        return {"train": train, "validation": validation, "dev": test}

    def _read(self, split: str, stems: tuple[str, ...]) -> list[Example]:
        folder = data_folder(self.path, "sst2")
        where = str(find_file(folder, stems)) if folder else "stanfordnlp/sst2"
        rows = (
            read_rows(find_file(folder, stems), COLUMNS)
            if folder
            else read_hub("stanfordnlp/sst2", split)
        )
        return [self._example(row, f"{where}: row {i + 1}") for i, row in enumerate(rows)]

    def _example(self, row: dict[str, Any], where: str) -> Example:
        if str(row["label"]) not in ("0", "1"):
            raise RecipeError(
                f"{where}: label {row['label']!r} is neither 0 nor 1. Correct or remove the row."
            )
        text = row["sentence"]
        text = text.strip() if isinstance(text, str) else text
        return labelled([text], int(row["label"]), where)


@surgery.hookimpl
def register_tasks(register: surgery.RegisterTask) -> None:
    register(SST2)
