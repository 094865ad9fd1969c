"""Metrics reach their known figures, and small cases worked out by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from surgery_recipes.metrics import coqa, meteor, ngram_overlap


@pytest.fixture
def conversations(real: Path) -> list[list[str]]:
    """The four answers to each turn of the development subset, the main one first."""
    data = json.loads(gzip.decompress((real / "coqa/dev_subset.json.gz").read_bytes()))["data"]
    return [
        [row[i]["input_text"] for row in (story["answers"], *story["additional_answers"].values())]
        for story in data
        for i in range(len(story["answers"]))
    ]


@pytest.mark.data
def test_people_reach_the_known_scores_on_coqa(conversations: list[list[str]]) -> None:
    assert coqa.human(conversations) == pytest.approx((78.0, 88.9), abs=0.05)


@pytest.mark.data
def test_main_answers_reach_the_known_scores_on_coqa(conversations: list[list[str]]) -> None:
    main = [own[0] for own in conversations]
    scores = coqa.scores(main, conversations, ["all"] * len(main))
    assert (scores["em"], scores["f1"]) == pytest.approx((93.4, 96.5), abs=0.05)
    assert scores["f1_all"] == scores["f1"]


def test_coqa_drops_case_articles_and_punctuation_and_counts_words() -> None:
    assert coqa.exact("The  Cat!", "a cat") == 1
    assert coqa.f1("the big cat", "a cat sat") == pytest.approx(0.5)
    assert (coqa.f1("", "the"), coqa.f1("", "cat")) == (1, 0)
    assert coqa.against(coqa.exact, "cat", ["cat", "dog", "dog"]) == pytest.approx(2 / 3)
    assert coqa.against(coqa.exact, "cat", ["cat"]) == 1


@pytest.fixture
def lexicalisations(real: Path) -> list[list[str]]:
    """The references of each test entry that has more than one."""
    data = json.loads(gzip.decompress((real / "webnlg/test.json.gz").read_bytes()))["entries"]
    texts = [[lex["lex"] for lex in e["lexicalisations"]] for row in data for e in row.values()]
    return [own for own in texts if len(own) > 1]


@pytest.mark.slow
@pytest.mark.data
def test_first_references_reach_the_known_bleu_and_meteor_on_webnlg(
    lexicalisations: list[list[str]],
) -> None:
    first, others = [own[0] for own in lexicalisations], [own[1:] for own in lexicalisations]
    assert len(first) == 1753
    scores = ngram_overlap.scores(first, others, ter=False)
    assert scores["bleu"] == pytest.approx(46.7, abs=0.05)
    assert scores["chrf"] == pytest.approx(67.7, abs=0.05)
    with meteor.scorer() as measure:
        found = measure(first, others)
    assert found == ({} if meteor.why_not() else {"meteor": pytest.approx(0.4147, abs=5e-5)})


def test_overlap_takes_any_number_of_references_and_says_how_it_counts() -> None:
    scores = ngram_overlap.scores(
        ["a small cat sat here", "b"], [["x y z", "a small cat sat here"], ["b"]]
    )
    assert scores["bleu"] == pytest.approx(100)
    assert scores["ter"] == 0
    assert ngram_overlap.signatures()["bleu"].startswith("nrefs:var|case:lc")


def test_without_java_there_is_no_meteor_and_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "Java" in meteor.why_not() or "pip install" in meteor.why_not()
    with meteor.scorer() as measure:
        assert measure(["a"], [["a"]]) == {}
