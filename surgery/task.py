"""Task: the base class of everything that a recipe can train a model for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from surgery.errors import RecipeError

Kind = Literal["classifier", "decoder"]
Example = Mapping[str, Any]
Features = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """What to learn and how to score it: a frozen dataclass of its data options.

    A subclass sets these and writes the methods below; the recipe's ``data:`` are its fields.

    * ``name``: what recipes call it.
    * ``kind``: the model it needs. A ``classifier`` is given a new head with :attr:`labels` classes
      and answers with a class; a ``decoder`` goes on writing after :meth:`prompt`.
    * ``metric``: the score that closing tables show, a key of what :meth:`score` gives.
    """

    name: ClassVar[str] = ""
    kind: ClassVar[Kind] = "classifier"
    metric: ClassVar[str] = ""

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes of a classifier, in the order of their numbers."""
        return ()

    @property
    def tokens(self) -> tuple[str, ...]:
        """Tokens that the vocabulary needs besides its own; only their embeddings are trained."""
        return ()

    @property
    def segments(self) -> bool:
        """Do features have ``token_type_ids`` that are tokens of the vocabulary?"""
        return False

    @property
    def decoding(self) -> dict[str, Any]:
        """Of a decoder: ``max_new_tokens``, ``num_beams`` and so on, for ``generate``."""
        return {}

    def splits(self) -> dict[str, list[Example]]:
        """The examples: ``train``, ``validation``, and the sets to score, by name.

        Raises:
            RecipeError: a file or a column is missing, or an example is empty.
        """
        raise self.missing("splits()")

    def encode(self, example: Example, tokenizer: Any) -> Features:
        """What the model reads in training: ``input_ids``, ``labels``, maybe segments."""
        raise self.missing("encode(example, tokenizer)")

    def prompt(self, example: Example, tokenizer: Any) -> Features:
        """What the model reads when it is to answer: :meth:`encode` without the answer."""
        return {k: v for k, v in self.encode(example, tokenizer).items() if k != "labels"}

    def stop(self, tokenizer: Any) -> list[int]:
        """Ids of the tokens at which a decoder stops."""
        return [tokenizer.eos_token_id]

    def score(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, float]:
        """Scores of the answers (class numbers, or texts) to the examples of one set."""
        raise self.missing("score(answers, examples)")

    def main_score(self, answers: Sequence[Any], examples: Sequence[Example]) -> float:
        """The score called :attr:`metric` alone, for many small sets; NaN if a set has none."""
        return self.score(answers, examples).get(self.metric, float("nan"))

    def notes(self) -> dict[str, str]:
        """How scores are computed, by name: signatures, versions, or why one is not there."""
        return {}

    def source(self, example: Example) -> str:
        """The input, for people."""
        raise self.missing("source(example)")

    def references(self, example: Example) -> list[str]:
        """Right answers, for people."""
        raise self.missing("references(example)")

    def missing(self, what: str) -> RecipeError:
        """The error that a subclass has not written ``what``."""
        return RecipeError(f"task {type(self).__name__} does not implement {what}.")
