"""Three tasks as another package would write them, with public names alone.

The test installs this file as a package of its own, with an entry point in the group ``surgery``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import surgery
from surgery import Example, Features, TaskKind
from surgery_recipes.tasks import (
    Classification,
    Generation,
    Piece,
    data_folder,
    find_file,
    hold_out,
    labelled,
    not_empty,
    read_rows,
)


@dataclass(frozen=True)
class Repeat(surgery.Task):
    """Say a letter again."""

    name: ClassVar[str] = "repeat"
    kind: ClassVar[TaskKind] = "decoder"
    metric: ClassVar[str] = "right"

    letters: str = "abcd"

    @property
    def decoding(self) -> dict[str, Any]:
        return {"max_new_tokens": 2, "do_sample": False}

    def splits(self) -> dict[str, list[Example]]:
        letters = [{"letter": letter} for letter in self.letters]
        return {"train": letters * 8, "exam": letters}

    def encode(self, example: Example, tokenizer: Any) -> Features:
        ids = tokenizer(example["letter"] * 2)["input_ids"] + self.stop(tokenizer)
        return {"input_ids": ids, "labels": [-100, *ids[1:]]}

    def prompt(self, example: Example, tokenizer: Any) -> Features:
        return {"input_ids": tokenizer(example["letter"])["input_ids"]}

    def score(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, float]:
        right = [a == e["letter"] for a, e in zip(answers, examples, strict=True)]
        return {"right": sum(right) / len(right)}

    def source(self, example: Example) -> str:
        return str(example["letter"])

    def references(self, example: Example) -> list[str]:
        return [str(example["letter"])]


@dataclass(frozen=True)
class Spell(Generation):
    """Write the letters of a word apart; the words are in ``words.tsv``."""

    name: ClassVar[str] = "spell"
    metric: ClassVar[str] = "right"

    max_new_tokens: int = 8

    @property
    def tokens(self) -> tuple[str, ...]:
        return ("<word>", "<letters>")

    def splits(self) -> dict[str, list[Example]]:
        folder = data_folder(self.path, "spell")
        assert folder is not None
        rows = read_rows(find_file(folder, ("words",)), ("word",))
        words = [not_empty(row["word"], f"row {i + 1}") for i, row in enumerate(rows)]
        examples = [{"word": w, "target": " ".join(w), "references": [" ".join(w)]} for w in words]
        train, exam = hold_out(examples, 1, "words")
        return {"train": train, "exam": exam}

    def pieces(self, example: Example) -> list[Piece]:
        return [("<word>", example["word"]), ("<letters>", None)]

    def score(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, float]:
        right = [a == e["target"] for a, e in zip(answers, examples, strict=True)]
        return {"right": sum(right) / len(right)}

    def source(self, example: Example) -> str:
        return str(example["word"])


@dataclass(frozen=True)
class Long(Classification):
    """Tell words of more than four letters from shorter ones."""

    name: ClassVar[str] = "long"

    @property
    def labels(self) -> tuple[str, ...]:
        return ("short", "long")

    def splits(self) -> dict[str, list[Example]]:
        folder = data_folder(self.path, "long")
        assert folder is not None
        rows = read_rows(find_file(folder, ("words",)), ("word",))
        words = [str(row["word"]) for row in rows]
        examples = [labelled([w], int(len(w) > 4), f"row {i + 1}") for i, w in enumerate(words)]
        return {"train": examples, "exam": examples}


@surgery.hookimpl
def register_tasks(register: surgery.RegisterTask) -> None:
    register(Repeat)
    register(Spell)
    register(Long)
