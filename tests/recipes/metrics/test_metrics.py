"""Metrics reach their known figures, and small cases worked out by hand."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from pathlib import Path

import pytest

import surgery
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


def multi_bleu(answers: list[str], references: list[list[str]]) -> float:
    """BLEU as Papineni et al. 2002 define it: no smoothing, the closest length."""
    right, total, ours, theirs = [0] * 4, [0] * 4, 0, 0
    for answer, own in zip(answers, references, strict=True):
        words, refs = answer.split(), [text.split() for text in own]
        ours += len(words)
        theirs += min((abs(len(r) - len(words)), len(r)) for r in refs)[1]
        for n in range(1, 5):
            have = Counter(zip(*(words[i:] for i in range(n)), strict=False))
            most: Counter[tuple[str, ...]] = Counter()
            for r in refs:
                most |= Counter(zip(*(r[i:] for i in range(n)), strict=False))
            right[n - 1] += sum((have & most).values())
            total[n - 1] += sum(have.values())
    precision = sum(math.log(a / b) for a, b in zip(right, total, strict=True)) / 4
    return 100 * math.exp(precision + min(0.0, 1 - theirs / ours))


def test_the_challenge_s_bleu_is_that_of_its_definition() -> None:
    references = [
        ["Acharya's Institute is in Bangalore, India.", "It's (in) Bangalore, in India!"],
        ["The élan of Müller_2 was born in 1990.", "Müller_2, born 1990."],
    ]
    answers = ["Acharya's Institute is in Bangalore.", "The elan of Müller_2 was born in 1990."]
    clean = ngram_overlap.as_challenge
    assert clean("It's (in) Müller_2!") == "it ' s ( in ) muller_2 !"
    texts, refs = [*map(clean, answers)], [[*map(clean, own)] for own in references]
    found = ngram_overlap.scores(texts, refs, ter=False, challenge=True)["bleu"]
    assert found == pytest.approx(multi_bleu(texts, refs))
    task = surgery.task("webnlg", path="", meteor=False, ter=False, scoring="challenge")
    examples = [{"references": [*own, own[0], "a b c d"], "seen": True} for own in references]
    assert task.score(answers, examples)["bleu"] == pytest.approx(found)
    assert "tok:none" in task.notes()["bleu"]
    plain = surgery.task("webnlg", path="", meteor=False, ter=False)
    assert plain.score(answers, examples)["bleu"] != pytest.approx(found)
    resampled = task.score_resamples(answers, examples, [[0, 1], [1, 1]])
    assert resampled["bleu"][0] == pytest.approx(found)
