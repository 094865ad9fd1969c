"""The class that a plugin's tasks derive from: what to learn, and how answers are scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from surgery.errors import RecipeError

TaskKind = Literal["classifier", "image_classifier", "decoder"]


Example = Mapping[str, Any]


Features = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """What to learn and how to score it: a frozen dataclass of its data options.

    A subclass sets the attributes and writes the methods below. Its fields are the recipe's
    ``data:``.

    Attributes:
        name: the name in recipes.
        kind: the model that the task needs. A ``classifier`` gets a new head with :attr:`labels`
            classes and answers with a class; so does an ``image_classifier``, whose features are
            ``pixel_values`` and whose ``tokenizer`` is an image processor; a ``decoder`` continues
            the text of :meth:`prompt`.
        metric: the score that closing tables show, a key of the result of :meth:`score`.

    Example:
        ``task = surgery.task("sst2", path="data")``; ``print(task.kind)``
    """

    name: ClassVar[str] = ""
    kind: ClassVar[TaskKind] = "classifier"
    metric: ClassVar[str] = ""

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes of a classifier, in the order of their numbers."""
        return ()

    @property
    def tokens(self) -> tuple[str, ...]:
        """Tokens to add to the vocabulary; of the embeddings, only theirs are trained."""
        return ()

    @property
    def segments(self) -> bool:
        """Whether features have ``token_type_ids`` that are tokens of the vocabulary."""
        return False

    @property
    def decoding(self) -> dict[str, Any]:
        """Options of ``generate`` for a decoder, such as ``max_new_tokens`` and ``num_beams``."""
        return {}

    def splits(self) -> dict[str, list[Example]]:
        """Return the examples: ``train``, ``validation``, and the sets to score, by name.

        Raises:
            RecipeError: a file or a column is missing, or an example is empty.
        """
        raise self.missing("splits()")

    def encode(self, example: Example, tokenizer: Any) -> Features:
        """Return the features of one example for training: ``input_ids``, ``labels``, segments."""
        raise self.missing("encode(example, tokenizer)")

    def prompt(self, example: Example, tokenizer: Any) -> Features:
        """Return the features of one example for inference: :meth:`encode` without the answer."""
        return {k: v for k, v in self.encode(example, tokenizer).items() if k != "labels"}

    def stop(self, tokenizer: Any) -> list[int]:
        """Return the ids of the tokens at which a decoder stops."""
        return [tokenizer.eos_token_id]

    def score(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, float]:
        """Score the answers (class numbers or texts) to the examples of one set."""
        raise self.missing("score(answers, examples)")

    def main_score(self, answers: Sequence[Any], examples: Sequence[Example]) -> float:
        """Return the score called :attr:`metric` alone; NaN if the set has no such score."""
        return self.score(answers, examples).get(self.metric, float("nan"))

    def notes(self) -> dict[str, str]:
        """Return how scores are computed, by name: signatures, versions, reasons of absence."""
        return {}

    def source(self, example: Example) -> str:
        """Return the input of an example as text for people."""
        raise self.missing("source(example)")

    def references(self, example: Example) -> list[str]:
        """Return the right answers to an example as text for people."""
        raise self.missing("references(example)")

    def missing(self, what: str) -> RecipeError:
        """Return the error that a subclass does not implement ``what``."""
        return RecipeError(f"task {type(self).__name__} does not implement {what}.")
