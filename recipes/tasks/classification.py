"""The base class of tasks that assign a class to a text or a pair of texts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import surgery
from surgery import Example, Features, RecipeError, TaskKind


@dataclass(frozen=True)
class Classification(surgery.Task):
    """A task of classes. An example has ``texts`` (one, or a pair) and ``label`` (a number).

    A derived class writes ``splits`` and ``labels``. The score is ``accuracy``, unless it writes
    ``score`` too.

    Attributes:
        path: the file or folder of the data.
        max_length: the most tokens of an example. Longer ones are cut, the longer text of a pair
            first.
    """

    kind: ClassVar[TaskKind] = "classifier"
    metric: ClassVar[str] = "accuracy"

    path: str = ""
    max_length: int = 512

    def __post_init__(self) -> None:
        if self.max_length < 8:
            raise RecipeError(
                f"task {self.name!r}: max_length={self.max_length} leaves almost nothing of an "
                "example between its special tokens. Take 8 or more."
            )

    def encode(self, example: Example, tokenizer: Any) -> Features:
        tokens = tokenizer(*example["texts"], truncation=True, max_length=self.max_length)
        return {**tokens, "labels": example["label"]}

    def score(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, float]:
        right = sum(a == e["label"] for a, e in zip(answers, examples, strict=True))
        return {"accuracy": right / len(examples)}

    def source(self, example: Example) -> str:
        return "\n".join(example["texts"])

    def references(self, example: Example) -> list[str]:
        return [self.labels[example["label"]]]


def labelled(texts: Sequence[str], label: int, where: str) -> dict[str, Any]:
    """An example of these texts and this label.

    Raises:
        RecipeError: a text is empty. The message begins with ``where``.
    """
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise RecipeError(f"{where}: an empty sentence. Remove the row from the file.")
    return {"texts": tuple(texts), "label": label}


def hold_out(examples: list[Any], count: int, where: str) -> tuple[list[Any], list[Any]]:
    """Split examples into training and validation examples, ``count`` of them for validation.

    They are drawn at random, and always the same.

    Raises:
        RecipeError: none would be left for training or validation.
    """
    if not 0 < count < len(examples):
        raise RecipeError(
            f"{where}: {count} of {len(examples)} examples cannot be held out for validation. "
            "Change data.held_out."
        )
    drawn = set(random.Random(0).sample(range(len(examples)), count))
    rest = [example for i, example in enumerate(examples) if i not in drawn]
    return rest, [examples[i] for i in sorted(drawn)]
