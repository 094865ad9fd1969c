"""CoQA: answer the next question of a conversation about a text (Reddy et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import surgery
from surgery import Example, Features, RecipeError
from surgery_recipes.metrics import coqa
from surgery_recipes.tasks.classification import hold_out
from surgery_recipes.tasks.data_files import data_folder, find_file, read_hub, read_json
from surgery_recipes.tasks.generation import Generation, Piece, not_empty, token_ids

BOS, EOS = "<bos_qa>", "<eos_qa>"
QUESTION, ANSWER, DOCUMENT = "<question>", "<answer>", "<document>"
HUB = "stanfordnlp/coqa"


@dataclass(frozen=True)
class CoQA(Generation):
    """``<bos_qa> <document> text (<question> q <answer> a)... <question> q <answer> a <eos_qa>``.

    The official development set is scored. Conversations of the training set are held out to choose
    the epoch. The earlier answers in a prompt are the gold ones, as in the official evaluation.

    Attributes:
        path: a folder with ``coqa-train*.json`` and ``coqa-dev*.json`` (or ``train*``, ``dev*``).
            Without a path the data are ``coqa`` below $SURGERY_DATA, or else ``stanfordnlp/coqa``
            of the hub, which has one answer to each question instead of the official four.
        max_document: the most tokens of the text.
        history: how many earlier turns are in a prompt.
        with_segments: whether markers are segments too. GPT-2 takes segments.
        held_out: the share of training conversations that is held out to choose the epoch.
    """

    name: ClassVar[str] = "coqa"
    metric: ClassVar[str] = "f1"

    max_new_tokens: int = 40
    max_document: int = 400
    history: int = 2
    with_segments: bool = True
    held_out: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_document < 1 or self.history < 0 or not 0 < self.held_out < 1:
            raise RecipeError(
                "task 'coqa': max_document must be 1 or more, history 0 or more, and held_out "
                "between 0 and 1."
            )

    @property
    def tokens(self) -> tuple[str, ...]:
        return (BOS, EOS, QUESTION, ANSWER, DOCUMENT)

    @property
    def segments(self) -> bool:
        return self.with_segments

    def stop(self, tokenizer: Any) -> list[int]:
        others = [token for token in self.tokens if token != EOS]
        return [*tokenizer.convert_tokens_to_ids([EOS, *others]), tokenizer.eos_token_id]

    def pieces(self, example: Example) -> list[Piece]:
        turns = [
            piece
            for question, answer in example["turns"][-self.history :]
            if self.history
            for piece in ((QUESTION, question), (ANSWER, answer))
        ]
        return [
            (DOCUMENT, example["story"]),
            *turns,
            (QUESTION, example["question"]),
            (ANSWER, None),
        ]

    def prompt(self, example: Example, tokenizer: Any) -> Features:
        """The prompt of the pieces behind ``<bos_qa>``, whose segment is the document's."""
        features = super().prompt(example, tokenizer)
        segment = features.get("token_type_ids", [])[:1]
        first = {"input_ids": token_ids(tokenizer, BOS), "token_type_ids": segment}
        return {name: first[name] + ids for name, ids in features.items()}

    def cut(self, token: str, ids: list[int]) -> list[int]:
        return ids[: self.max_document] if token == DOCUMENT else ids

    def splits(self) -> dict[str, list[Example]]:
        stories = self._read("train", ("coqa-train", "train"))
        count = max(1, round(self.held_out * len(stories)))
        train, validation = hold_out(stories, count, "coqa train")
        dev = self._read("validation", ("coqa-dev", "dev"))
        parts = {"train": train, "validation": validation, "dev": dev}
        return {name: [turn for story in part for turn in story] for name, part in parts.items()}

    def source(self, example: Example) -> str:
        turns = [f"{q} {a}" for q, a in example["turns"][-self.history :] if self.history]
        return "\n".join([example["story"][:400] + " …", *turns, example["question"]])

    def score(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, float]:
        """Exact match and F1 in per cent, over all turns and over those of each source of texts."""
        return coqa.scores(
            list(answers), [e["references"] for e in examples], [e["domain"] for e in examples]
        )

    def notes(self) -> dict[str, str]:
        note = "the official scorer's definition, reimplemented; per cent over turns"
        if data_folder(self.path, "coqa") is None:
            note += "; with one reference for each question instead of the official four"
        return {"f1": note}

    def _read(self, split: str, stems: tuple[str, ...]) -> list[list[Example]]:
        folder = data_folder(self.path, "coqa")
        if folder is None:
            return [_from_hub(row, f"{HUB} {split}") for row in read_hub(HUB, split)]
        file = find_file(folder, stems, [".json"])
        try:
            return [_from_file(story, str(file)) for story in read_json(file)["data"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise RecipeError(
                f"{file}: not in CoQA's format, {type(error).__name__}: {error}. "
                'Expected {"data": [{"story", "questions", "answers", ...}]}.'
            ) from error


def _from_file(story: dict[str, Any], where: str) -> list[Example]:
    others = story.get("additional_answers", {}).values()
    answers = [[a["input_text"] for a in row] for row in (story["answers"], *others)]
    questions = [question["input_text"] for question in story["questions"]]
    return _turns(story, questions, answers, f"{where}: {story['id']}")


def _from_hub(row: dict[str, Any], where: str) -> list[Example]:
    return _turns(row, row["questions"], [row["answers"]["input_text"]], where)


def _turns(
    story: dict[str, Any], questions: list[str], answers: list[list[str]], where: str
) -> list[Example]:
    if any(len(row) != len(questions) for row in answers):
        raise RecipeError(
            f"{where}: {len(questions)} questions, and another number of answers. Every "
            "question needs one in each list of answers."
        )
    text = not_empty(story["story"], where)
    pairs = [
        (not_empty(q, where), not_empty(a, where))
        for q, a in zip(questions, answers[0], strict=True)
    ]
    return [
        {
            "story": text,
            "domain": story["source"],
            "turns": pairs[:i],
            "question": question,
            "target": answer,
            "references": [row[i] for row in answers],
        }
        for i, (question, answer) in enumerate(pairs)
    ]


@surgery.hookimpl
def register_tasks(register: surgery.RegisterTask) -> None:
    register(CoQA)
