"""Tasks: what a model reads, what is scored, and how mistakes in data are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as tr

import surgery
from surgery.errors import RecipeError
from tests.recipes import tiny


def tokenizer(task: surgery.Task, root: Path) -> Any:
    model, _ = tiny.prepared(task.name, root)
    made = tr.AutoTokenizer.from_pretrained(model)
    made.add_special_tokens({"additional_special_tokens": list(task.tokens)})
    return made


def read(made: Any, ids: list[int]) -> str:
    return str(made.decode(ids))


def test_webnlg_with_markers_is_written_as_the_reference_writes_it(root: Path) -> None:
    _, data = tiny.prepared("webnlg", root)
    task = surgery.task("webnlg", path=str(data))
    splits = task.splits()
    assert {k: len(v) for k, v in splits.items()} == {"train": 16, "validation": 16, "test": 8}
    made = tokenizer(task, root)
    features = task.encode(splits["train"][0], made)
    prompt = '<bos_webnlg><subject>Town_0<property>isIn<object>"Land 0"<target_webnlg>'
    assert read(made, features["input_ids"]) == prompt + "Town 0 is in land 0.<eos_webnlg>"
    start = len(task.prompt(splits["train"][0], made)["input_ids"])
    assert features["labels"][:start] == [-100] * start
    assert features["labels"][start:] == features["input_ids"][start:]
    segments = read(made, features["token_type_ids"])
    written = len("Town 0 is in land 0.") + 1
    assert segments == (
        "<bos_webnlg>" + "<subject>" * 7 + "<property>" * 5 + "<object>" * 9
        + "<target_webnlg>" * (1 + written)
    )  # fmt: skip


def test_webnlg_with_bars_is_written_as_li_and_liang_write_it(root: Path) -> None:
    _, data = tiny.prepared("webnlg", root)
    task = surgery.task("webnlg", path=str(data), linearisation="bars")
    made = tokenizer(task, root)
    features = task.encode(task.splits()["train"][0], made)
    end = "<|endoftext|>"
    assert read(made, features["input_ids"]) == (
        f' | Town_0 : isIn : "Land 0"{end} Town 0 is in land 0.{end}'
    )
    assert (task.tokens, set(features)) == ((), {"input_ids", "labels"})


def test_webnlg_scores_seen_and_unseen_categories_apart(root: Path) -> None:
    _, data = tiny.prepared("webnlg", root)
    task = surgery.task("webnlg", path=str(data), meteor=False)
    test = task.splits()["test"]
    right = [e["references"][0] if e["seen"] else "no such thing at all" for e in test]
    scores = task.score(right, test)
    assert scores["bleu_seen"] == pytest.approx(100)
    assert scores["bleu_unseen"] == pytest.approx(0, abs=1)
    assert scores["bleu_unseen"] < scores["bleu"] < scores["bleu_seen"]
    assert (scores["ter_seen"], scores["chrf_seen"]) == pytest.approx((0, 100))


@pytest.mark.parametrize("history", [0, 1, 2])
def test_coqa_cuts_the_document_and_the_history(history: int, root: Path) -> None:
    _, data = tiny.prepared("coqa", root)
    task = surgery.task("coqa", path=str(data), history=history, max_document=9, held_out=0.2)
    made = tokenizer(task, root)
    last = next(e for e in task.splits()["train"] if len(e["turns"]) == 2)
    turns = [f"<question>What is {k}?<answer>a thing {k}" for k in range(2)]
    prompt = "<bos_qa><document>" + last["story"][:9] + "".join(turns[2 - history :])
    features = task.encode(last, made)
    assert read(made, features["input_ids"]) == (
        prompt + "<question>What is 2?<answer>a thing 2<eos_qa>"
    )
    segments = read(made, features["token_type_ids"])
    assert segments.startswith("<document>" * 11 + "<question>" * 11)
    assert segments.endswith("<answer>" * (len("a thing 2") + 2))


def test_coqa_has_four_references_and_holds_whole_conversations_out(root: Path) -> None:
    _, data = tiny.prepared("coqa", root)
    splits = surgery.task("coqa", path=str(data), held_out=0.25).splits()
    assert {len(e["references"]) for e in splits["dev"]} == {4}
    train, held = ({e["story"] for e in splits[name]} for name in ("train", "validation"))
    assert (len(train), len(held), train & held) == (6, 2, set())


def test_mnli_reads_pairs_drops_unlabelled_ones_and_scores_both_sets(root: Path) -> None:
    _, data = tiny.prepared("mnli", root)
    task = surgery.task("mnli", path=str(data), validation=3)
    splits = task.splits()
    assert {k: len(v) for k, v in splits.items()} == {"train": 6, "validation": 3, "dev": 12}
    made = tokenizer(task, root)
    assert read(made, task.encode(splits["train"][0], made)["input_ids"]) == (
        "<s>It is 0.</s></s>It is 1.</s>"
    )
    given = [e["label"] if e["set"] == "matched" else 9 for e in splits["dev"]]
    assert task.score(given, splits["dev"]) == {"accuracy_matched": 1, "accuracy_mismatched": 0}


def spoil(data: Path, folder: Path, name: str, text: str | None) -> Path:
    """A copy of a data folder in which one file is other, or missing."""
    folder.mkdir()
    for file in data.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for file in folder.glob(f"*{name}*"):
        file.unlink()
    if text is not None:
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("task", "name", "text", "part"),
    [
        ("sst2", "dev.tsv", None, r"no dev\* or validation\* with .*Here: train.tsv"),
        ("sst2", "dev.tsv", "sentence\tmark\nfine\t1\n", "no column 'label'. Columns: sentence"),
        ("sst2", "dev.tsv", "sentence\tlabel\n \t1\n", "row 1: an empty sentence"),
        ("sst2", "dev.tsv", "sentence\tlabel\nfine\t7\n", "label '7' is neither 0 nor 1"),
        ("sst2", "dev.tsv", "sentence\tlabel\nfine\n", "row 1 has no 'label'"),
        ("mnli", "train.jsonl", '{"premise": "a"}', "no column hypothesis or sentence2"),
        ("mnli", "train.jsonl", "nonsense", "a line is not JSON"),
        ("webnlg", "train.json", "{", "this is not JSON"),
        ("webnlg", "train.json", '{"rows": []}', "not in the challenge's format"),
        ("coqa", "coqa-train-v1.0.json", '{"data": [{}]}', "not in CoQA's format"),
        ("mnli", "multinli_1.0_train.jsonl.gz", "not zipped", "cannot be read"),
    ],
)
def test_bad_data_are_named(
    task: str, name: str, text: str | None, part: str, root: Path, tmp_path: Path
) -> None:
    _, data = tiny.prepared(task, root)
    small = {"sst2": {"held_out": 2}}.get(task, {})
    with pytest.raises(RecipeError, match=part):
        surgery.task(task, path=str(spoil(data, tmp_path / "bad", name, text)), **small).splits()


@pytest.mark.parametrize(
    ("task", "options", "part"),
    [
        ("webnlg", {"linearisation": "commas"}, "must be markers or bars"),
        ("webnlg", {"beams": 0}, "beams must be 1 or more"),
        ("coqa", {"history": -1}, "history 0 or more"),
        ("sst2", {"max_lenght": 3}, r"no data option 'max_lenght'. Did you mean 'max_length'\?"),
        ("sst2", {"path": "/nowhere"}, "no such folder"),
    ],
)
def test_a_bad_option_of_a_task_is_named(task: str, options: dict[str, Any], part: str) -> None:
    with pytest.raises(RecipeError, match=part):
        surgery.task(task, **options).splits()


@pytest.mark.data
@pytest.mark.parametrize(
    ("task", "options", "sizes"),
    [
        ("webnlg", {}, {"train": 18025, "validation": 2258, "test": 1862}),
        ("coqa", {}, {"dev": 436}),
        ("sst2", {}, {"train": 66349, "validation": 1000, "dev": 872}),
        ("mnli", {}, {"train": 13393, "validation": 1600, "dev": 9815 + 5093}),
        ("mnli", {"mismatched_if": "tf_sample"}, {"dev": 9815 + 999}),
    ],
)
def test_the_real_data_have_their_known_sizes(
    task: str, options: dict[str, Any], sizes: dict[str, int], real: Path
) -> None:
    splits = surgery.task(task, path=str(real / task), **options).splits()
    assert {name: len(splits[name]) for name in sizes} == sizes
    if task == "webnlg":
        assert sum(example["seen"] for example in splits["test"]) == 971
        assert json.dumps(splits["train"][0]["triples"][0][0]) == '"Aarhus_Airport"'


def test_an_entry_without_texts_is_refused(tmp_path: Path) -> None:
    folder = tiny.save_data("webnlg", tmp_path)
    content = json.loads((folder / "test.json").read_text())
    content["entries"][2]["3"]["lexicalisations"] = []
    (folder / "test.json").write_text(json.dumps(content))
    with pytest.raises(RecipeError, match="entry 3: no text verbalises the triples"):
        surgery.task("webnlg", path=str(folder)).splits()
