"""Resamples of the examples are the same for all runs, and are scored as the task scores."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import surgery
from surgery_recipes.metrics import ngram_overlap
from surgery_recipes.run.resampling import (
    DRAWS,
    draws,
    read_resampled,
    resampled,
    write_resampled,
)

WORDS = "a city in the north of Wales has an airport with two runways .".split()


def texts(count: int) -> tuple[list[str], list[list[str]]]:
    rng = np.random.default_rng(0)

    def text() -> str:
        return " ".join(rng.choice(WORDS, rng.integers(4, 12)))

    references = [[text() for _ in range(rng.integers(1, 4))] for _ in range(count)]
    return [own[0] if i % 3 else text() for i, own in enumerate(references)], references


def test_draws_depend_on_the_number_of_examples_alone() -> None:
    assert list(draws(7)) == list(draws(7))
    assert len(list(draws(7))) == DRAWS
    assert all(len(chosen) == 7 and set(chosen) <= set(range(7)) for chosen in draws(7))


def test_a_score_of_resamples_is_the_score_of_each() -> None:
    task = surgery.task("sst2", path="")
    examples = [{"label": i % 2, "texts": ["x"]} for i in range(30)]
    given = [int(i % 3 == 0) for i in range(30)]
    found = resampled(task, given, examples)
    assert found["accuracy"]["examples"] == 30
    for chosen, value in zip(draws(30), found["accuracy"]["values"], strict=True):
        assert value == statistics.mean(given[i] == examples[i]["label"] for i in chosen)


def test_sums_of_sentences_give_the_scores_of_the_corpus() -> None:
    answers, references = texts(40)
    chosen = list(draws(40))[:5]
    found = ngram_overlap.resampled(answers, references, chosen)
    for number, draw in enumerate(chosen):
        whole = ngram_overlap.scores([answers[i] for i in draw], [references[i] for i in draw])
        assert found["bleu"][number] == pytest.approx(whole["bleu"])
        assert found["ter"][number] == pytest.approx(whole["ter"])


def test_webnlg_scores_resamples_as_it_scores() -> None:
    answers, references = texts(40)
    task = surgery.task("webnlg", path="", meteor=False)
    examples: list[dict[str, Any]] = [
        {"references": own, "seen": i % 2 == 0} for i, own in enumerate(references)
    ]
    found = resampled(task, answers, examples)
    assert set(found) == {
        f"{name}{part}" for name in ("bleu", "ter") for part in ("", "_seen", "_unseen")
    }
    first = next(draws(40))
    whole = task.score([answers[i] for i in first], [examples[i] for i in first])
    for name, score in found.items():
        assert score["values"][0] == pytest.approx(whole[name])


def test_a_folder_without_resamples_has_none(tmp_path: Path) -> None:
    assert read_resampled(tmp_path) == {}
    write_resampled(tmp_path, {"f1": {"examples": 2, "values": [0.5]}})
    assert read_resampled(tmp_path)["f1"]["values"] == [0.5]
    (tmp_path / "resampled.json").write_text("[1")
    assert read_resampled(tmp_path) == {}
