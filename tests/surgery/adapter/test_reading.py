"""Reading: only plain files of a bounded size are opened, and links of the hub's cache."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import surgery
from surgery.adapter.reading import read
from tests.support.models import build
from tests.support.splices import untouched

SPECIAL: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a file": lambda path: path.symlink_to(path.with_name("elsewhere")),
    "a link to itself": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("which", ["surgery.json", "*.safetensors"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_plain_file_is_refused(saved: Path, which: str, kind: str) -> None:
    (path,) = saved.glob(which)
    path.rename(path.with_name("elsewhere"))
    SPECIAL[kind](path)
    model = build("roberta")
    with pytest.raises(surgery.StoreError, match=str(path)):
        surgery.load(model, saved)
    assert untouched(model)


def test_a_snapshot_in_the_cache_of_the_hub_is_read(saved: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--somebody--adapter"
    for folder in ("snapshots/0a1b", "snapshots/0a1b/small", "blobs"):
        (cache / folder).mkdir(parents=True)
    for number, path in enumerate(saved.iterdir()):
        shutil.copy(path, cache / f"blobs/{number}")
        (cache / "snapshots/0a1b" / path.name).symlink_to(f"../../blobs/{number}")
        (cache / "snapshots/0a1b/small" / path.name).symlink_to(f"../../../blobs/{number}")
    surgery.load(build("roberta"), cache / "snapshots/0a1b")
    (tmp_path / "here").symlink_to(cache / "snapshots/0a1b")  # the folder may be a link
    for folder in (cache / "snapshots/0a1b/small", tmp_path / "here"):
        assert read(folder)[0] == read(saved)[0]


def test_a_file_that_is_larger_than_an_adapter_can_be_is_not_read(saved: Path) -> None:
    (path,) = saved.glob("*.safetensors")
    os.truncate(path, 1 << 40)  # it takes no room on the disk
    with pytest.raises(surgery.StoreError, match=r"1,099,511,627,776 bytes, more than"):
        surgery.load(build("roberta"), saved)
    os.truncate(saved / "surgery.json", 1 << 40)
    with pytest.raises(surgery.StoreError, match=r"surgery.json has 1,099,511,627,776 bytes"):
        surgery.load(build("roberta"), saved)
