"""The classes that a plugin's methods and tasks derive from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

from surgery.errors import MethodError, RecipeError, suggest
from surgery.plugin.edit import Kind
from surgery.plugin.open_site import OpenSite
from surgery.plugin.site import Site

KINDS = get_args(Kind)


Start = Literal["exact", "gated", "none"]


@dataclasses.dataclass(frozen=True)
class Method:
    """A parameter-efficient method: a frozen dataclass of its hyperparameters.

    A subclass sets ``name``, says which sites it is for, and writes :meth:`splice`:

    * ``name``: what ``surgery.method(name, ...)`` and recipes call it.
    * ``kinds``: the kinds of site that it is for, or :meth:`suits` for a finer choice.
    * ``needs``: what it says that it needs, where it suits no site.
    * ``together``: do its modules work only all together? Then what they do is verified in one run
      of the trunk, not host by host.
    * :attr:`start`: what a fresh splice does to the model. ``exact`` leaves every output bit
      (a zero-initialised residual), ``gated`` too, through a gate that starts at zero, ``none``
      changes outputs. ``surgery.splice`` verifies what is declared.

    Check hyperparameters in ``__post_init__`` with :meth:`require`.
    """

    name: ClassVar[str] = ""
    kinds: ClassVar[tuple[str, ...]] = ("attention",)
    needs: ClassVar[str] = ""
    together: ClassVar[bool] = False

    @property
    def start(self) -> Start:
        """What a fresh splice does to the outputs: ``exact``, ``gated`` or ``none``."""
        return "exact"

    def suits(self, site: Site) -> bool:
        """Is this method for that site?"""
        return site.kind in self.kinds

    def check(self, sites: list[Site]) -> None:
        """Look at all sites that it is about to be spliced at; raise if one is missing."""

    def plain(self) -> Method:
        """The method whose modules hold what is left of this one's after training.

        A module whose own parameters are not what it leaves (a reparametrised prefix) has
        ``plain_state()``: the ``state_dict`` of the module that ``plain()`` would insert there.
        """
        return self

    def splice(self, site: OpenSite) -> None:
        """Insert modules at ports of ``site``. Called once per site, in the order of the list."""
        raise MethodError(f"method {type(self).__name__} does not implement splice(site).")

    def require(self, condition: bool, option: str, wish: str) -> None:
        """Raise unless ``condition`` holds of the value of ``option``."""
        if not condition:
            raise MethodError(
                f"method {self.name!r}: {option}={getattr(self, option)!r} is not possible. "
                f"It must be {wish}."
            )

    def check_declared(self) -> None:
        """Raise if what the class declares, or an option, is nothing that a splice can work with.

        Raises:
            MethodError: an unknown kind or start, or an option that no JSON can hold.
        """
        who = f"method {self.name!r}"
        for kind in self.kinds:
            if kind not in KINDS:
                raise MethodError(
                    f"{who}: there is no kind of site {kind!r}. {suggest(kind, KINDS)}"
                    f"Kinds: {', '.join(KINDS)}."
                )
        if self.start not in get_args(Start):
            raise MethodError(
                f"{who}: start={self.start!r} must be one of {', '.join(get_args(Start))}."
            )
        for option, value in self.options().items():
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise MethodError(
                    f"{who}: {option}={value!r} is nothing that JSON can hold ({error}), so an "
                    "adapter with it could not be saved. Take a name or numbers instead."
                ) from error

    def options(self) -> dict[str, Any]:
        """The hyperparameters, as plain data for a saved adapter."""
        return dataclasses.asdict(self)


TaskKind = Literal["classifier", "decoder"]


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
    kind: ClassVar[TaskKind] = "classifier"
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
