"""Tasks of any data set: local files and the hub are read, split, labelled, trained, scored."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import surgery
from surgery.cli import app
from surgery.errors import RecipeError
from surgery_recipes.recipe_files import find_recipe, read_recipe
from surgery_recipes.run import dry_run, evaluate
from tests.recipes import tiny
from tests.recipes.run.runs import QUIET

TOPICS = ["World", "Sports", "Business"]
ROWS: list[dict[str, Any]] = [
    {"text": f'news, number {i} of "{TOPICS[i % 3]}"', "label": TOPICS[i % 3]} for i in range(30)
]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as the kind of file that its name says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    name = file.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), file)
        return file
    if name.endswith(".json"):
        text = json.dumps(rows)
    elif name.endswith(("l", "ndjson")):
        text = "\n".join(map(json.dumps, rows))
    else:
        lines = []
        for cells in [list(rows[0]), *(list(row.values()) for row in rows)]:
            if name.endswith(".tsv"):
                lines.append("\t".join(map(str, cells)))
            else:
                lines.append(",".join('"' + str(c).replace('"', '""') + '"' for c in cells))
        text = "\n".join(lines) + "\n"
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return file


def classify(**options: Any) -> surgery.Task:
    return surgery.task("classify", **options)


@pytest.mark.parametrize(
    "name", ["a.csv", "a.tsv", "a.jsonl", "a.ndjson", "a.json", "a.parquet", "a.csv.gz"]
)
def test_each_kind_of_file_gives_the_same_examples(name: str, tmp_path: Path) -> None:
    task = classify(path=str(write(tmp_path / name, ROWS)))
    splits = task.splits()
    assert {split: len(rows) for split, rows in splits.items()} == {
        "train": 24, "validation": 3, "test": 3,
    }  # fmt: skip
    assert task.labels == ("Business", "Sports", "World")
    found = sorted(
        (e["texts"][0], task.labels[e["label"]]) for rows in splits.values() for e in rows
    )
    assert found == sorted((str(row["text"]), row["label"]) for row in ROWS)
    assert splits == classify(path=str(tmp_path / name)).splits(), "held out the same way again"


def test_a_folder_a_column_and_named_files_give_the_same_splits(tmp_path: Path) -> None:
    parts = {"train": ROWS[:20], "dev": ROWS[20:25], "test": ROWS[25:]}
    for split, rows in parts.items():
        write(tmp_path / f"folder/{split}.csv", rows)
        write(tmp_path / f"named/my_{split}.jsonl", rows)
    marked = [{**row, "split": split} for split, rows in parts.items() for row in rows]
    one = write(tmp_path / "one.csv", marked)
    named = {"validation": "my_dev.jsonl", "test": "my_test.jsonl"}
    first = classify(path=str(tmp_path / "folder")).splits()
    assert [len(rows) for rows in first.values()] == [20, 5, 5]
    assert classify(path=str(one)).splits() == first
    assert classify(path=str(tmp_path / "named/my_train.jsonl"), **named).splits() == first
    assert classify(path=str(tmp_path / "named"), train="my_train.jsonl", **named).splits() == first


def test_a_validation_split_is_scored_where_there_is_no_test_split(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", ROWS[:20])
    write(tmp_path / "validation.csv", ROWS[20:])
    splits = classify(path=str(tmp_path), held_out=4).splits()
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": 16, "validation": 4, "test": 10,
    }  # fmt: skip
    assert set(classify(path=str(tmp_path), held_out=0).splits()) == {"train", "test"}


def test_a_data_set_of_the_hub_brings_its_splits_and_class_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    kinds = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=TOPICS[::-1])}
    )
    columns = {"text": [r["text"] for r in ROWS], "label": [i % 3 for i in range(30)]}
    rows = datasets.Dataset.from_dict(columns, features=kinds)
    asked = []

    def load(name: str, config: str | None) -> Any:
        asked.append((name, config))
        return datasets.DatasetDict(train=rows, test=rows.select(range(6)))

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = classify(path="fancyzhx/ag_news")
    splits = task.splits()
    assert asked == [("fancyzhx/ag_news", None)]
    assert task.labels == ("Business", "Sports", "World")
    assert [e["label"] for e in splits["test"]] == [0, 1, 2, 0, 1, 2]
    assert [len(part) for part in splits.values()] == [27, 3, 6]
    with pytest.raises(RecipeError, match=r"no split 'tset'. Did you mean 'test'\?.*Set data.test"):
        classify(path="fancyzhx/ag_news", test="tset").splits()


def test_labels_are_names_or_numbers_and_pairs_are_two_texts(tmp_path: Path) -> None:
    rows = [{"a": f"one {i}", "b": f"two {i}", "y": y} for i, y in enumerate([0, "no", 1.0, True])]
    path = str(write(tmp_path / "a.jsonl", rows * 3))
    task = classify(path=path, texts=["a", "b"], label="y", labels=["yes", "no", "true"])
    examples = [e for part in task.splits().values() for e in part]
    assert {e["texts"]: e["label"] for e in examples} == {
        ("one 0", "two 0"): 0, ("one 1", "two 1"): 1, ("one 2", "two 2"): 1, ("one 3", "two 3"): 2,
    }  # fmt: skip
    numbers = [{"text": "x", "label": str(n)} for n in (10, 9, 2)] * 5
    task = classify(path=str(write(tmp_path / "n.csv", numbers)))
    task.splits()
    assert task.labels == ("2", "9", "10")


@pytest.mark.parametrize(
    ("name", "text", "options", "part"),
    [
        (
            "a.csv",
            None,
            {"text": "txt"},
            r"a.csv: no column 'txt'. Did you mean 'text'\?.*data.text",
        ),
        ("a.csv", None, {"texts": ["text", "lable"]}, r"no column 'lable'.*Set data.texts"),
        ("a.csv", None, {"label": "klass"}, "no column 'klass'. .*Set data.label"),
        (
            "a.csv",
            None,
            {"metrics": ["accuarcy"]},
            r"no metric 'accuarcy'. Did you mean 'accuracy'",
        ),
        ("a.csv", None, {"metrics": []}, "at least one score"),
        ("a.csv", None, {"metrics": {"a": 1}}, "data.metrics=.* must be a list"),
        ("a.csv", None, {"metrics": ["f1"]}, "of two classes, and there are 3. Take f1_macro"),
        ("a.csv", None, {"labels": ["World", "Sports"]}, "row 3: label 'Business' is none of the"),
        ("a.csv", None, {"labels": ["World"]}, "must name two classes or more"),
        ("a.csv", None, {"label": "text"}, "30 different values in 30 training rows, which are no"),
        ("a.csv", None, {"held_out": -1}, "data.held_out=-1 must be a number, 0 or more"),
        ("a.csv", None, {"held_out": 30}, "30 of 30 rows cannot be held out as the test split"),
        ("a.csv", None, {"test": "b.csv"}, "b.csv: no such data file"),
        ("a.xlsx", "", {}, r"a.xlsx: a file that ends in '.xlsx' cannot be read. Save it"),
        (
            "a.csv",
            "text,label\nfine\n",
            {},
            r"row 1 \(line 2\) has 1 cells, but the header names 2",
        ),
        ("a.csv", 'text,label\n"a"b,c\n', {}, "row 1 cannot be read: ',' expected after"),
        ("a.csv", "text,text\na,b\n", {}, "two columns have the name 'text'"),
        ("a.csv", "text,label\n", {}, "no rows in it"),
        ("a.csv", "text,label\nfine,a\n ,b\n", {}, "a.csv: row 2: an empty sentence"),
        ("a.csv", "text,label\nfine,a\nbad,\n", {}, "row 2: label '' is no class"),
        (
            "a.csv",
            "text,label,split\nfine,a,tran\n",
            {"test": ""},
            "row 1: split 'tran' must be one of",
        ),
        ("a.jsonl", '{"text": "fine", "label": 1}\n{', {}, "line 2 is not JSON"),
        ("a.jsonl", "[1]\n", {}, r"row 1 is \[1\]. Each must be an object"),
        ("a.json", "{}", {}, "must be a list of objects"),
        ("a.jsonl", '{"text": 3, "label": "b"}\n' * 2, {"labels": ["b", "c"]}, "row 1: an empty"),
        ("a.parquet", "no parquet", {}, "a.parquet cannot be read as Parquet"),
    ],
)
def test_a_mistake_names_file_row_and_remedy(
    name: str, text: str | None, options: dict[str, Any], part: str, tmp_path: Path
) -> None:
    if text is None:
        write(tmp_path / name, ROWS)
    else:
        (tmp_path / name).write_text(text)
    held_out = {"held_out": 0, "test": name}
    if not {"held_out", "test"} & set(options):
        options = {**held_out, **options}
    with pytest.raises(RecipeError, match=part):
        classify(path=str(tmp_path / name), **options).splits()


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("", "data.path is missing"),
        ("nowhere.csv", "no such file or folder"),
        ("a/b/c", "which is written owner/name"),
        ("../x y", "which is written owner/name"),
    ],
)
def test_a_wrong_path_is_named_before_the_hub_is_asked(
    path: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a: pytest.fail("asked"))
    with pytest.raises(RecipeError, match=part):
        classify(path=path).splits()


def test_what_the_hub_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*_: Any) -> Any:
        raise FileNotFoundError("no such data set")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(RecipeError, match="cannot be downloaded from the hub: no such data set"):
        classify(path="own/er").splits()


def recipe(folder: Path, content: dict[str, Any]) -> Path:
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


STEPS = {
    "max_steps": 3, "logging_steps": 1, "report_to": "none", "disable_tqdm": True,
    "use_cpu": True, "per_device_train_batch_size": 4,
}  # fmt: skip


def run(file: Path, *words: str) -> str:
    done = CliRunner().invoke(app, ["train", str(file), *words])
    return f"{done.exit_code} {done.output}"


def test_a_users_file_trains_classes_and_is_scored_again(root: Path, tmp_path: Path) -> None:
    model, _ = tiny.prepared("sst2", root)
    data = write(tmp_path / "news.csv", ROWS)
    content = {
        "model": str(model), "task": "classify", "output": str(tmp_path / "run"),
        "data": {"path": str(data), "metrics": ["f1_macro", "accuracy", "matthews_corrcoef"]},
        "splice": [{"method": "lora", "rank": 2}], "training": STEPS,
    }  # fmt: skip
    said = run(recipe(tmp_path, content))
    assert said.startswith("0 "), said
    row = json.loads((tmp_path / "run/metrics.json").read_text())["rows"][0]
    assert set(row["scores"]) == {"f1_macro", "accuracy", "matthews_corrcoef"}
    assert row["score"] == row["scores"]["f1_macro"]
    assert evaluate(tmp_path / "run", QUIET) == row["scores"]
    lines = (tmp_path / "run/answers.jsonl").read_text().splitlines()
    assert {json.loads(line)["answer"] for line in lines} <= set(TOPICS)


@pytest.mark.parametrize("option", ["data.text=txt", "data.metrics=[bluh]", "data.path=not there"])
def test_a_mistake_leaves_nothing_behind(option: str, root: Path, tmp_path: Path) -> None:
    model, _ = tiny.prepared("sst2", root)
    content = {
        "model": str(model), "task": "classify", "output": str(tmp_path / "run"),
        "data": {"path": str(write(tmp_path / "news.csv", ROWS))},
        "splice": [{"method": "lora"}], "training": STEPS,
    }  # fmt: skip
    said = run(recipe(tmp_path, content), option)
    assert said.startswith("1 error: "), said
    assert not (tmp_path / "run").exists()


def test_ag_news_is_five_lines_and_trains_on_local_files(root: Path, tmp_path: Path) -> None:
    file = Path(__file__).parents[3] / "recipes/ag_news.yaml"
    lines = file.read_text().splitlines()
    beside = [line for line in lines if not line.startswith(("#", "about:", "extends:"))]
    assert len(beside) == 5
    model, _ = tiny.prepared("sst2", root)
    data = write(tmp_path / "news.csv", ROWS)
    given = [f"model={model}", f"data={data}", "device=cpu", f"output={tmp_path / 'run'}"]
    assert 0 < dry_run(read_recipe(find_recipe("ag_news"), given), QUIET) < 20


PAIRS: list[dict[str, Any]] = [
    {"word": f"w{i}", "n": i, "twice": f"w{i} w{i}", "several": [f"w{i}", f"v{i}"]}
    for i in range(12)
]


def generate(path: Path, **options: Any) -> surgery.Task:
    given = {"template": "Say {word} {n} times:\n", "target": "twice", **options}
    return surgery.task("generate", path=str(path), **given)


def test_a_template_makes_prompts_and_only_targets_are_learnt(root: Path, tmp_path: Path) -> None:
    import transformers as tr

    model, _ = tiny.prepared("webnlg", root)
    tokenizer = tr.AutoTokenizer.from_pretrained(model)
    path = write(tmp_path / "pairs.jsonl", PAIRS)
    task = generate(path)
    [example] = [e for e in task.splits()["train"] if "w3 " in e["prompt"]]
    assert example == {"prompt": "Say w3 3 times:\n", "references": ["w3 w3"]}
    features = task.encode(example, tokenizer)
    learnt = [i for i, y in zip(features["input_ids"], features["labels"], strict=True) if y >= 0]
    assert tokenizer.decode(learnt) == "w3 w3" + tokenizer.eos_token
    assert tokenizer.decode(features["input_ids"]).startswith("Say w3 3 times:\nw3 w3")
    assert task.prompt(example, tokenizer)["input_ids"] == features["input_ids"][: -len(learnt)]
    joined = generate(path, template="{{{word}}} is ", max_prompt=6)
    [example] = [e for e in joined.splits()["train"] if "w3" in e["prompt"]]
    assert tokenizer.decode(joined.prompt(example, tokenizer)["input_ids"]) == "w3} is"
    assert tokenizer.decode(joined.encode(example, tokenizer)["input_ids"][6:9]) == " w3"


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"template": "no column"}, "names no column"),
        ({"template": "{wrod}"}, r"no column 'wrod'. Did you mean 'word'\?.*Set data.template"),
        ({"template": "{word"}, "expected '}' before end of string. Write {{ for a brace"),
        ({"template": "{word:>8}"}, "and no format"),
        ({"template": "{word.__class__}"}, "no column 'word.__class__'"),
        ({"target": "thrice"}, "no column 'thrice'.*Set data.target"),
        ({"target": "n"}, "row 1: column 'n': an empty text"),
        ({"metrics": ["rouge"]}, "no metric 'rouge'. Did you mean"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
        ({"max_prompt": 1.5}, "max_prompt=1.5 must be a whole number"),
    ],
)
def test_a_mistake_in_a_template_is_named(
    options: dict[str, Any], part: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "pairs.jsonl", PAIRS)
    with pytest.raises(RecipeError, match=part):
        generate(path, **options).splits()


def test_a_users_file_trains_texts_and_is_scored_again(root: Path, tmp_path: Path) -> None:
    model, _ = tiny.prepared("webnlg", root)
    content = {
        "model": str(model), "task": "generate", "output": str(tmp_path / "run"),
        "data": {
            "path": str(write(tmp_path / "pairs.jsonl", PAIRS)), "template": "Say {word}:",
            "target": "several", "metrics": ["chrf", "exact_match"], "max_new_tokens": 4,
        },
        "splice": [{"method": "lora", "rank": 2}], "training": STEPS,
    }  # fmt: skip
    said = run(recipe(tmp_path, content))
    assert said.startswith("0 "), said
    kept = json.loads((tmp_path / "run/metrics.json").read_text())
    assert set(kept["rows"][0]["scores"]) == {"chrf", "exact_match"}
    assert "nrefs" in kept["notes"]["chrf"]
    assert evaluate(tmp_path / "run", QUIET) == kept["rows"][0]["scores"]


def test_the_limit_of_csv_fields_is_put_back(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    rows = [{"text": "x" * (before + 1), "label": "a"}, {"text": "y", "label": "b"}]
    write(tmp_path / "a.csv", rows)
    task = classify(path=str(tmp_path / "a.csv"), test="a.csv", held_out=0)
    assert len(task.splits()["train"][0]["texts"][0]) == before + 1
    assert csv.field_size_limit() == before
