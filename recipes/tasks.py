"""Tasks: how text becomes examples, and how predictions become a score."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from surgery.errors import suggest
from surgery.recipe import Recipe, RecipeError

HERE = Path(__file__).parent


@dataclass(frozen=True)
class SentenceClassification:
    """Two classes, told apart by a number beside each sentence.

    Attributes:
        file: a TSV with a header, maybe gzipped, with a column ``split`` (train, test);
            ``package:`` before a name means one that comes with the recipes.
        text, label: the columns of the sentence and of the number.
        positive_above: the label is 1 where the number is greater.
        max_length: tokens after which a sentence is cut.
    """

    file: str
    text: str = "text"
    label: str = "label"
    positive_above: float = 0.5
    max_length: int = 128

    metric: ClassVar[str] = "accuracy"
    auto_class: ClassVar[Any] = AutoModelForSequenceClassification
    model_options: ClassVar[dict[str, Any]] = {"num_labels": 2}

    def splits(self, tokenizer: Any) -> dict[str, Dataset]:
        """Tokenised training and test sets.

        Raises:
            RecipeError: the file, a column or a split is missing, or a label is no number.
        """
        rows = _read_tsv(self.file, ("split", self.text, self.label))
        splits: dict[str, Dataset] = {}
        for name in ("train", "test"):
            chosen = [row for row in rows if row["split"] == name]
            if not chosen:
                raise RecipeError(f"{self.file}: no rows with split {name!r}.")
            try:
                labels = [int(float(row[self.label]) > self.positive_above) for row in chosen]
            except ValueError as error:
                raise RecipeError(f"{self.file}: column {self.label!r}: {error}.") from error
            texts = [row[self.text] for row in chosen]
            tokens = tokenizer(texts, truncation=True, max_length=self.max_length)
            splits[name] = Dataset.from_dict({**tokens, "labels": labels})
        return splits

    def collator(self, tokenizer: Any) -> Any:
        """Pads each batch to its longest sentence."""
        return DataCollatorWithPadding(tokenizer)

    def score(self, prediction: Any) -> dict[str, float]:
        """Accuracy."""
        right = np.argmax(prediction.predictions, -1) == prediction.label_ids
        return {self.metric: float(np.mean(right))}


TASKS = {"sentence_classification": SentenceClassification}


def make_task(recipe: Recipe) -> SentenceClassification:
    """The task of a recipe, with its options checked."""
    if recipe.task not in TASKS:
        raise RecipeError(
            f"no task {recipe.task!r}. {suggest(recipe.task, TASKS)}Tasks: {', '.join(TASKS)}."
        )
    cls = TASKS[recipe.task]
    known = [f.name for f in dataclasses.fields(cls)]
    for option in recipe.data:
        if option not in known:
            raise RecipeError(
                f"task {recipe.task!r} has no data option {option!r}. {suggest(option, known)}"
                f"Options: {', '.join(known)}."
            )
    try:
        return cls(**recipe.data)
    except TypeError as error:
        raise RecipeError(f"task {recipe.task!r}: {error}.") from error


def _read_tsv(name: str, columns: tuple[str, ...]) -> list[dict[str, str]]:
    path = (
        HERE / "data" / name.removeprefix("package:") if name.startswith("package:") else Path(name)
    )
    if not path.is_file():
        raise RecipeError(f"{path}: no such data file.")
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = io.StringIO(raw.decode(), newline="")
    reader = csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE)
    missing = [c for c in columns if c not in (reader.fieldnames or [])]
    if missing:
        raise RecipeError(f"{path}: no column {missing[0]!r}. Columns: {reader.fieldnames}.")
    return list(reader)
