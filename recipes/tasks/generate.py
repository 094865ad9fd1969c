"""Generate: continue a text that a template makes of each row of any data set."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import surgery
from surgery import Example, Features, RecipeError
from surgery_recipes.metrics import by_name, ngram_overlap
from surgery_recipes.recipe_files import shown
from surgery_recipes.tasks.any_task import AnyData
from surgery_recipes.tasks.generation import IGNORED, Generation, not_empty, token_ids


@dataclass(frozen=True)
class AnyTexts(AnyData, Generation):
    """Texts to write after prompts of any data set, scored by the metrics of a recipe."""

    metrics: Sequence[str] = ("bleu",)

    def __post_init__(self) -> None:
        self.check_options("metrics")
        super().__post_init__()
        by_name.check_names(self.metrics, by_name.TEXT_SCORES, f"task {self.name!r}")

    def score(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, float]:
        return by_name.text_scores(self.metrics, answers, [e["references"] for e in examples])

    def notes(self) -> dict[str, str]:
        known = set(self.metrics) & {"bleu", "chrf", "ter"}
        found = ngram_overlap.signatures() if known else {}
        return {name: note for name, note in found.items() if name in known}


@dataclass(frozen=True)
class Generate(AnyTexts):
    """A text to write after a prompt: ``template`` with the columns of a row, then ``target``.

    The target is joined to the prompt by a space, unless the template ends in a line break. It ends
    with the end token of the tokenizer. Only the target counts in the loss.

    Attributes:
        template: the prompt, with columns in braces: ``"Question: {question}\\nAnswer:"``. ``{{``
            is a brace.
        target: the column of the text to write; a list of texts is several right answers, of which
            the first is learnt.
        max_prompt: the most tokens of a prompt; longer ones lose their beginning. 0 is no limit.
    """

    name: ClassVar[str] = "generate"

    template: str = ""
    target: str = "target"  # type: ignore[assignment]
    max_prompt: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.columns():
            raise RecipeError(
                f"data.template={shown(self.template)} names no column. Write columns in braces, "
                'such as "Question: {question}\\nAnswer:".'
            )

    def columns(self) -> tuple[str, ...]:
        """The columns that the template names.

        Raises:
            RecipeError: its braces do not match, or hold more than the name of a column.
        """
        try:
            parts = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise RecipeError(
                f"data.template={shown(self.template)}: {error}. Write {{{{ for a brace."
            ) from error
        if any(spec or change for _, _, spec, change in parts):
            raise RecipeError(
                f"data.template={shown(self.template)}: braces hold the name of a column, and no "
                "format."
            )
        return tuple(dict.fromkeys(name for _, name, _, _ in parts if name is not None))

    def splits(self) -> dict[str, list[Example]]:
        tables = self.tables()
        for table in tables.values():
            table.require(self.columns(), "template")
            table.require([str(self.target)], "target")
        return {
            split: [self._example(row, where) for where, row in table]
            for split, table in tables.items()
        }

    def _example(self, row: dict[str, Any], where: str) -> Example:
        right = row.get(str(self.target))
        references = [
            not_empty(text, f"{where}: column {self.target!r}")
            for text in (right if isinstance(right, list) and right else [right])
        ]
        return {"prompt": self._filled(row, where), "references": references}

    def _filled(self, row: dict[str, Any], where: str) -> str:
        """The template with the texts and numbers of a row."""
        made = ""
        for text, name, _, _ in string.Formatter().parse(self.template):
            made += text
            if name is not None:
                value = row.get(name)
                number = isinstance(value, (int, float))
                column = f"{where}: column {name!r}"
                made += str(value) if number else not_empty(value, column)
        return made

    def prompt(self, example: Example, tokenizer: Any) -> Features:
        ids = token_ids(tokenizer, example["prompt"].rstrip(" "))
        ids = ids[-self.max_prompt :] if self.max_prompt else ids
        return {"input_ids": [*_begin(tokenizer), *ids]}

    def encode(self, example: Example, tokenizer: Any) -> Features:
        before = self.prompt(example, tokenizer)["input_ids"]
        space = "" if example["prompt"].endswith("\n") else " "
        answer = token_ids(tokenizer, space + example["references"][0]) + self.stop(tokenizer)[:1]
        return {"input_ids": before + answer, "labels": [IGNORED] * len(before) + answer}

    def source(self, example: Example) -> str:
        return str(example["prompt"])


def _begin(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts in front of a text, such as Llama's beginning."""
    whole = list(tokenizer("a")["input_ids"])
    bos = tokenizer.bos_token_id
    return whole[:1] if bos is not None and whole[:1] == [bos] else []


@surgery.hookimpl
def register_tasks(register: surgery.RegisterTask) -> None:
    register(Generate)
