"""WebNLG 2017: verbalise a few RDF triples (Gardent et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import surgery
from surgery import Example, Features, RecipeError
from surgery_recipes.metrics import meteor, ngram_overlap
from surgery_recipes.tasks.data_files import data_folder, download, find_file, read_json
from surgery_recipes.tasks.generation import Generation, Piece, not_empty, token_ids

BOS, EOS, TARGET = "<bos_webnlg>", "<eos_webnlg>", "<target_webnlg>"
PARTS = {"subject": "<subject>", "property": "<property>", "object": "<object>"}
WEB = (  # the hub has a script instead of files, and datasets no longer runs scripts
    "https://raw.githubusercontent.com/microsoft/LoRA/main/examples/NLG/data/"
    "webnlg_challenge_2017/{}.json"
)
SHA256 = {
    "train": "180edb6011360608c8548d4551366a9d55f140cbf9bc9397fbf4d97f6a89c639",
    "dev": "50f5a2c24d760bc84ba3e852707cd3b43b0cf2da035b425f87945a2440880488",
    "test": "2574896b23b5959d1a0cd4bb501ffbeff1a11790a9996c4cb8efed289149ff4f",
}


@dataclass(frozen=True)
class WebNLG(Generation):
    """The challenge's data, scored over seen categories, unseen categories and both.

    A category is seen if it occurs in the training set. Triples are written in one of two ways:

    ``markers``: ``<bos_webnlg> (<subject> s <property> p <object> o)... <target_webnlg> text
    <eos_webnlg>``, with the markers as segments, as in the code of the inducer paper.
    ``bars``: `` | s : p : o | s : p : o <eos> text <eos>``, as in Li and Liang 2021, whose <bos> is
    GPT-2's <eos>. It has no new tokens, so it works with any decoder.

    Attributes:
        path: a folder with ``train*.json``, ``dev*.json`` and ``test*.json``. Without a path the
            data are ``webnlg`` below $SURGERY_DATA, or else the files in LoRA's repository.
        linearisation: ``markers`` or ``bars``.
        with_segments: whether markers are segments too. GPT-2 takes segments.
        ter: whether to compute TER, which takes minutes over the whole test set.
        meteor: whether to compute METEOR, which needs Java.
        scoring: ``sacrebleu``, or ``challenge``: texts prepared as the challenge of 2017 does,
            three references, and BLEU as multi-bleu computes it.
    """

    name: ClassVar[str] = "webnlg"
    metric: ClassVar[str] = "bleu"

    linearisation: Literal["markers", "bars"] = "markers"
    with_segments: bool = True
    ter: bool = True
    meteor: bool = True
    scoring: Literal["sacrebleu", "challenge"] = "sacrebleu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scoring not in ("sacrebleu", "challenge"):
            raise RecipeError(
                f"task 'webnlg': scoring={self.scoring!r} must be sacrebleu or challenge."
            )
        if self.linearisation not in ("markers", "bars"):
            raise RecipeError(
                f"task 'webnlg': linearisation={self.linearisation!r} must be markers or bars."
            )

    @property
    def tokens(self) -> tuple[str, ...]:
        return (BOS, EOS, *PARTS.values(), TARGET) if self.linearisation == "markers" else ()

    @property
    def segments(self) -> bool:
        return self.linearisation == "markers" and self.with_segments

    def stop(self, tokenizer: Any) -> list[int]:
        markers = [EOS, *(token for token in self.tokens if token != EOS)] if self.tokens else []
        return [*tokenizer.convert_tokens_to_ids(markers), tokenizer.eos_token_id]

    def pieces(self, example: Example) -> list[Piece]:
        named = [
            (token, part)
            for triple in example["triples"]
            for token, part in zip(PARTS.values(), triple, strict=True)
        ]
        return [(BOS, None), *named, (TARGET, None)]

    def prompt(self, example: Example, tokenizer: Any) -> Features:
        if self.linearisation == "markers":
            return super().prompt(example, tokenizer)
        text = "".join(f" | {s} : {p} : {o}" for s, p, o in example["triples"])
        return {"input_ids": [*token_ids(tokenizer, text), tokenizer.eos_token_id]}

    def target(self, example: Example) -> str:
        return ("" if self.linearisation == "markers" else " ") + example["target"]

    def splits(self) -> dict[str, list[Example]]:
        ngram_overlap.check()
        entries = {name: self._read(name) for name in ("train", "dev", "test")}
        seen = {entry["category"] for entry in entries["train"]}
        for entry in entries["test"]:
            entry["seen"] = entry["category"] in seen
        lines = {
            name: [{**entry, "target": text} for entry in entries[name] for text in entry["good"]]
            for name in ("train", "dev")
        }
        return {"train": lines["train"], "validation": lines["dev"], "test": entries["test"]}

    def source(self, example: Example) -> str:
        return "\n".join(" | ".join(triple) for triple in example["triples"])

    def score(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, float]:
        """BLEU, chrF++ and TER of sacrebleu, and METEOR 1.5 if Java is installed."""
        scores: dict[str, float] = {}
        with meteor.scorer() if self.meteor else nullcontext() as measure:
            for suffix, wanted in (("_seen", [True]), ("_unseen", [False]), ("", [True, False])):
                chosen = [
                    pair
                    for pair, example in zip(
                        zip(*self._texts(answers, examples), strict=True), examples, strict=True
                    )
                    if example["seen"] in wanted
                ]
                if chosen:
                    texts, references = map(list, zip(*chosen, strict=True))
                    found = ngram_overlap.scores(texts, references, self.ter, self.challenge)
                    found |= measure(texts, references) if measure else {}
                    scores |= {name + suffix: value for name, value in found.items()}
        return scores

    def score_resamples(
        self, answers: Sequence[Any], examples: Sequence[Example], draws: Sequence[Sequence[int]]
    ) -> dict[str, list[float]]:
        """BLEU and TER of resamples, see ``surgery_recipes.run.resampling``."""
        scores: dict[str, list[float]] = {}
        texts, references = self._texts(answers, examples)
        for suffix, wanted in (("_seen", [True]), ("_unseen", [False]), ("", [True, False])):
            chosen = [[i for i in draw if examples[i]["seen"] in wanted] for draw in draws]
            if all(chosen):
                found = ngram_overlap.resampled(texts, references, chosen, self.ter, self.challenge)
                scores |= {name + suffix: values for name, values in found.items()}
        return scores

    def main_score(self, answers: Sequence[Any], examples: Sequence[Example]) -> float:
        texts, references = self._texts(answers, examples)
        return ngram_overlap.scores(texts, references, False, self.challenge)["bleu"]

    @property
    def challenge(self) -> bool:
        return self.scoring == "challenge"

    def _texts(
        self, answers: Sequence[Any], examples: Sequence[Example]
    ) -> tuple[list[str], list[list[str]]]:
        """The answers and their references as they are scored."""
        references = [list(example["references"]) for example in examples]
        if not self.challenge:
            return list(answers), references
        clean = ngram_overlap.as_challenge
        return [*map(clean, answers)], [[*map(clean, own[:3])] for own in references]

    def notes(self) -> dict[str, str]:
        return {
            **ngram_overlap.signatures(self.challenge),
            "meteor": meteor.why_not() or meteor.LABEL,
        }

    def _read(self, name: str) -> list[dict[str, Any]]:
        folder = data_folder(self.path, "webnlg")
        if folder is None:
            file = download(WEB.format(name), SHA256[name])
        else:
            file = find_file(folder, (name,), [".json"])
        content = read_json(file)
        try:
            numbered = [next(iter(entry.items())) for entry in content["entries"]]
            return [_from_file(entry, f"{file}: entry {n}") for n, entry in numbered]
        except (KeyError, TypeError, AttributeError, StopIteration) as error:
            raise RecipeError(
                f"{file}: not in the challenge's format, {type(error).__name__}: {error}. "
                'Expected {"entries": [{"1": {"modifiedtripleset", "lexicalisations", ...}}]}.'
            ) from error


def _from_file(entry: dict[str, Any], where: str) -> dict[str, Any]:
    triples = [tuple(t[part] for part in PARTS) for t in entry["modifiedtripleset"]]
    texts = [(lex["lex"], lex["comment"]) for lex in entry["lexicalisations"]]
    if not triples or any(len(triple) != 3 for triple in triples):
        raise RecipeError(
            f"{where}: no triples, or triples without subject, property and object."
            " Remove the entry."
        )
    if not texts:
        raise RecipeError(f"{where}: no text verbalises the triples. Remove the entry.")
    clean = [(not_empty(text, where), comment) for text, comment in texts]
    return {
        "category": entry["category"],
        "triples": triples,
        "references": [text for text, _ in clean],
        "good": [text for text, comment in clean if comment in ("good", "")],
        "seen": True,
    }


@surgery.hookimpl
def register_tasks(register: surgery.RegisterTask) -> None:
    register(WebNLG)
