"""Data files are found and read, and damaged ones are named."""

from __future__ import annotations

from pathlib import Path

import pytest

import surgery
from surgery.errors import RecipeError
from surgery_recipes.tasks.data_files import read_rows
from tests.recipes import tiny


def test_files_with_a_mark_of_their_encoding_or_without_rows(tmp_path: Path) -> None:
    from surgery_recipes.tasks.data_files import read_rows

    (tmp_path / "a.tsv").write_bytes(b"\xef\xbb\xbfsentence\tlabel\nfine\t1\n")
    assert read_rows(tmp_path / "a.tsv", ["sentence"]) == [{"sentence": "fine", "label": "1"}]
    (tmp_path / "b.tsv").write_text("sentence\tlabel\n")
    with pytest.raises(RecipeError, match="no rows in it"):
        read_rows(tmp_path / "b.tsv", ["sentence"])
    (tmp_path / "c.tsv.gz").write_bytes(b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03damaged")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_rows(tmp_path / "c.tsv.gz", ["sentence"])


def test_data_are_found_below_the_environments_folder(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.prepared("sst2", root)
    monkeypatch.setenv("SURGERY_DATA", str(root))
    assert len(surgery.task("sst2", held_out=2).splits()["dev"]) == 8


def test_a_line_of_json_may_hold_any_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028two\x85"}\n', encoding="utf8")
    assert read_rows(tmp_path / "a.jsonl", ["text"]) == [{"text": "one\u2028two\x85"}]
    (tmp_path / "b.jsonl").write_text("[1]\n")
    with pytest.raises(RecipeError, match="must be a JSON object"):
        read_rows(tmp_path / "b.jsonl", ["text"])


def test_a_folder_of_several_sets_serves_each_task(root: Path) -> None:
    for task in ("webnlg", "coqa"):
        tiny.prepared(task, root)
        assert surgery.task(task, path=str(root)).splits()
