"""Generation: what tasks that write a text after a prompt have in common."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import surgery
from surgery import Example, Features, RecipeError, TaskKind

IGNORED = -100  # a label that no loss counts
Piece = tuple[str, str | None]


@dataclass(frozen=True)
class Generation(surgery.Task):
    """Examples have ``pieces`` (the prompt), ``target``, ``references`` and ``source``.

    A prompt is a list of pieces, each a text after a token that says what it is. With
    ``segments`` every position also has the token of its piece as segment, whose embedding the
    model adds:

        h_0 = wte[token] + wpe[position] + wte[segment]

    Attributes:
        path: where the data are.
        max_new_tokens: the longest answer that is generated.
        beams: 1 is greedy.
    """

    kind: ClassVar[TaskKind] = "decoder"

    path: str = ""
    max_new_tokens: int = 100
    beams: int = 1

    def __post_init__(self) -> None:
        for option in ("max_new_tokens", "beams"):
            if getattr(self, option) < 1:
                raise RecipeError(f"task {self.name!r}: {option} must be 1 or more.")

    @property
    def decoding(self) -> dict[str, Any]:
        return {"max_new_tokens": self.max_new_tokens, "num_beams": self.beams, "do_sample": False}

    def pieces(self, example: Example) -> list[Piece]:
        """The prompt: (token, text) pairs; the last has no text and is the answer's token."""
        raise self.missing("pieces(example)")

    def cut(self, token: str, ids: list[int]) -> list[int]:
        """The ids of a piece, shortened where the task does."""
        return ids

    def prompt(self, example: Example, tokenizer: Any) -> Features:
        ids: list[int] = []
        segments: list[int] = []
        for token, text in self.pieces(example):
            marker = token_ids(tokenizer, token)
            piece = marker + (self.cut(token, token_ids(tokenizer, text)) if text else [])
            ids += piece
            segments += marker[:1] * len(piece)
        features: Features = {"input_ids": ids}
        return features | ({"token_type_ids": segments} if self.segments else {})

    def encode(self, example: Example, tokenizer: Any) -> Features:
        features = self.prompt(example, tokenizer)
        answer = token_ids(tokenizer, self.target(example)) + self.stop(tokenizer)[:1]
        labels = [IGNORED] * len(features["input_ids"]) + answer
        if self.segments:
            features["token_type_ids"] += features["token_type_ids"][-1:] * len(answer)
        return {**features, "input_ids": features["input_ids"] + answer, "labels": labels}

    def target(self, example: Example) -> str:
        """The text to learn."""
        return str(example["target"])

    def references(self, example: Example) -> list[str]:
        return list(example["references"])


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a piece of text, and none around them."""
    return list(_token_ids(tokenizer, text))


@functools.lru_cache(maxsize=8192)
def _token_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Kept for later, as a document comes back with each question about it."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def not_empty(text: Any, where: str) -> str:
    """The text, unless it is empty or none."""
    if not isinstance(text, str) or not text.strip():
        raise RecipeError(f"{where}: an empty text. Take it out of the file.")
    return text.strip()
