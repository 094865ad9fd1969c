"""Without local files, each task downloads its data: here from a server that stands in for the web.

The tasks' own code downloads, over HTTP; only the address is another.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import surgery
from surgery.errors import RecipeError
from surgery_recipes.tasks import webnlg
from surgery_recipes.tasks.data_files import download, find_file, read_json, read_rows, read_text
from tests.recipes import tiny
from tests.support.stand_in import Files, Web, serve

PARTS = ("train", "dev", "test")
LABELS = {"entailment": 0, "neutral": 1, "contradiction": 2, "-": -1}
READ = """
import pickle, sys, surgery
read = {name: surgery.task(name, **more).splits() for name, more in eval(sys.argv[1]).items()}
pickle.dump(read, open(sys.argv[2], "wb"))
"""


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def webnlg_files(folder: Path) -> dict[str, bytes]:
    """The files of a WebNLG folder as the web has them, unzipped."""
    found = {part: find_file(folder, (part,), [".json"]) for part in PARTS}
    return {f"/data/{part}.json": read_text(file).encode() for part, file in found.items()}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache" / "surgery"


def kept(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*") if path.is_file())


def use(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webnlg, "WEB", f"{web.url}/data/{{}}.json")


def test_without_a_path_webnlg_comes_from_the_web(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(RecipeError, match=r"webnlg_challenge_2017/train.json.*refused.*data=PATH"):
        surgery.task("webnlg").splits()
    assert kept(cache) == []


def test_webnlg_is_downloaded_once(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, data = tiny.prepared("webnlg", root)
    files = webnlg_files(data)
    digests = {part: sha256(files[f"/data/{part}.json"]) for part in PARTS}
    monkeypatch.setattr(webnlg, "SHA256", digests)
    here = surgery.task("webnlg", path=str(data)).splits()
    with serve(files) as web:
        use(web, monkeypatch)
        assert surgery.task("webnlg").splits() == here
        assert web.asked == [f"GET /data/{part}.json" for part in PARTS]
        assert kept(cache) == sorted(f"{part}.json" for part in PARTS)
    assert surgery.task("webnlg").splits() == here  # the server is gone


@pytest.mark.data
def test_the_real_webnlg_files_are_those_that_the_task_expects(
    real: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(webnlg_files(real / "webnlg")) as web:
        use(web, monkeypatch)
        downloaded = surgery.task("webnlg").splits()
    assert downloaded == surgery.task("webnlg", path=str(real / "webnlg")).splits()


def test_a_download_that_fails_is_named_and_leaves_nothing(cache: Path) -> None:
    content = b"all of it" * 1000
    digest = sha256(content)
    advice = "Give local files with data=PATH, or a folder of all data sets in \\$SURGERY_DATA"
    with serve({"/a.json": content, "/b.json": b"something else"}) as web:
        url = f"{web.url}/a.json"
        web.broken.add("/a.json")
        with pytest.raises(
            RecipeError, match=f"a.json cannot be downloaded: IncompleteRead.*{advice}"
        ):
            download(url, digest)
        with pytest.raises(RecipeError, match=f"14 bytes have the SHA-256 .* not {digest}"):
            download(f"{web.url}/b.json", digest)
        with pytest.raises(RecipeError, match="HTTPError 404"):
            download(f"{web.url}/c.json", digest)
        assert kept(cache) == []
        web.broken.clear()
        assert download(url, digest).read_bytes() == content
    with pytest.raises(RecipeError, match=r"cannot be downloaded: .*refused"):
        download(url, sha256(b""))
    assert kept(cache) == ["a.json"]


def repository(splits: dict[str, list[dict[str, Any]]]) -> Files:
    """A data set as the hub keeps it: a card, and a Parquet file for each split."""
    names = {split: f"data/{split}-00000-of-00001.parquet" for split in splits}
    paths = "".join(f"  - {{split: {split}, path: {path}}}\n" for split, path in names.items())
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n{paths}---\n"
    files = {"README.md": card.encode()}
    for split, rows in splits.items():
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), buffer)
        files[names[split]] = buffer.getvalue()
    return files


def hub(data: Path) -> dict[str, Files]:
    """The hub's three data sets, made of the official files: their columns, names and labels."""

    def sst2(stem: str) -> list[dict[str, Any]]:
        rows = read_rows(find_file(data / "sst2", (stem,)), ("sentence", "label"))
        return [
            {"idx": i, "sentence": row["sentence"], "label": int(row["label"])}
            for i, row in enumerate(rows)
        ]

    def mnli(stem: str) -> list[dict[str, Any]]:
        rows = read_rows(find_file(data / "mnli", (stem, f"multinli_1.0_{stem}")), ())
        return [
            {
                "premise": row.get("premise", row.get("sentence1")),
                "hypothesis": row.get("hypothesis", row.get("sentence2")),
                "label": LABELS[row.get("label", row.get("gold_label"))],
            }
            for row in rows
        ]

    def coqa(stem: str) -> list[dict[str, Any]]:
        file = find_file(data / "coqa", (f"coqa-{stem}", stem), [".json"])
        return [
            {
                "source": story["source"],
                "story": story["story"],
                "questions": [question["input_text"] for question in story["questions"]],
                "answers": {"input_text": [answer["input_text"] for answer in story["answers"]]},
            }
            for story in read_json(file)["data"]
        ]

    sets = ("matched", "mismatched")
    return {
        "datasets/stanfordnlp/sst2": repository(
            {"train": sst2("train"), "validation": sst2("dev")}
        ),
        "datasets/nyu-mll/multi_nli": repository(
            {"train": mnli("train"), **{f"validation_{s}": mnli(f"dev_{s}") for s in sets}}
        ),
        "datasets/stanfordnlp/coqa": repository(
            {"train": coqa("train"), "validation": coqa("dev")}
        ),
    }


def check_hub(data: Path, options: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """Read three tasks from the stand-in, in a process of its own, and compare with the files."""
    here = {
        name: surgery.task(name, path=str(data / name), **o).splits() for name, o in options.items()
    }
    for examples in here["coqa"].values():  # the hub has one answer to each question
        for example in examples:
            example["references"] = example["references"][:1]
    environment = {
        k: v for k, v in os.environ.items() if k not in ("SURGERY_DATA", "HF_HUB_OFFLINE")
    }
    environment |= {"HF_HOME": str(tmp_path / "hub"), "NO_PROXY": "127.0.0.1"}
    sets = hub(data)
    with serve(repositories=sets) as web:
        words = [sys.executable, "-c", READ, repr(options), str(tmp_path / "read")]
        environment["HF_ENDPOINT"] = web.url
        subprocess.run(words, env=environment, check=True)
        fetched = [request for request in web.asked if request.endswith(".parquet")]
    assert {f"GET /{name}" for name in sets} <= {x.partition("/resolve/")[0] for x in fetched}
    assert pickle.loads((tmp_path / "read").read_bytes()) == here


@pytest.mark.slow
def test_the_hubs_data_sets_are_downloaded_and_read_like_files(root: Path, tmp_path: Path) -> None:
    for task in ("sst2", "mnli", "coqa"):
        tiny.prepared(task, root)
    check_hub(root, {"sst2": {"held_out": 2}, "mnli": {"validation": 3}, "coqa": {}}, tmp_path)


@pytest.mark.slow
@pytest.mark.data
def test_the_real_data_are_the_same_from_the_hub(real: Path, tmp_path: Path) -> None:
    check_hub(real, {"sst2": {}, "mnli": {}, "coqa": {}}, tmp_path)


@pytest.mark.parametrize(
    ("task", "hub"),
    [
        ("sst2", "stanfordnlp/sst2"),
        ("mnli", "nyu-mll/multi_nli"),
        ("coqa", "stanfordnlp/coqa"),
    ],
)
def test_without_a_path_data_come_from_the_hub(
    task: str, hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def offline(name: str, *args: Any, **options: Any) -> Any:
        asked.append(name)
        raise ConnectionError("offline")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(RecipeError, match=f"{hub}.*offline.*data=PATH"):
        surgery.task(task).splits()
    assert asked == [hub]


def test_rows_of_the_hub_are_read_like_those_of_files(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = {"source": "mctest", "story": "It was.", "questions": ["What?"]}
    rows = [{**story, "answers": {"input_text": ["it"]}}] * 2
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **o: rows)
    assert surgery.task("coqa").splits()["train"][0]["target"] == "it"
