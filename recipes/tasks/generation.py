"""The base class of tasks that generate a text after a prompt."""

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
    """A task of texts. An example has ``target`` (the text to learn) and ``references``.

    A prompt is a list of pieces, each a marker token with a text behind it. If the task has
    ``segments``, each position also has the marker of its piece as a segment, and the model adds
    the marker's embedding:

        h_0 = wte[token] + wpe[position] + wte[segment]

    A derived class writes ``splits``, ``pieces``, ``stop``, ``score`` and ``source``, and
    ``tokens`` if its markers are new to the vocabulary.

    Attributes:
        path: the folder of the data.
        max_new_tokens: the length of the longest answer that is generated.
        beams: the number of beams; 1 is greedy decoding.
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
        """The prompt as (marker, text) pairs. The last one marks the answer and has no text."""
        raise self.missing("pieces(example)")

    def cut(self, token: str, ids: list[int]) -> list[int]:
        """The ids of a piece, shortened if the task has a limit for it."""
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
    """The token ids of a text, without special tokens around it."""
    return list(_token_ids(tokenizer, text))


@functools.lru_cache(maxsize=8192)
def _token_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Cached, because a document comes back with each question about it."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def not_empty(text: Any, where: str) -> str:
    """A text without the white space around it.

    Raises:
        RecipeError: it is empty, or not a text. The message begins with ``where``.
    """
    if not isinstance(text, str) or not text.strip():
        raise RecipeError(f"{where}: an empty text. Remove it from the file.")
    return text.strip()
