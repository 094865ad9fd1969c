"""Writing: an adapter is replaced in one step; nothing else in the folder is touched."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import resource
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery.adapter import atomic_write
from surgery.adapter.reading import read
from tests.support.models import build, perturb
from tests.support.splices import built_with


@pytest.fixture
def model() -> Any:
    return built_with("gpt2", surgery.method("lora", rank=2))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


FOREIGN: dict[str, Any] = {
    "another model's weights": {"tensors": "model.safetensors"},
    "itself": {"tensors": "surgery.json"},
    "a path": {"tensors": "../model.safetensors"},
    "a digest of another file": {"tensors": "surgery-000000000000.safetensors", "sha256": "0" * 64},
    "no JSON": None,
}


@pytest.mark.parametrize("named", FOREIGN)
def test_a_save_removes_no_file_that_a_foreign_description_names(
    model: Any, tmp_path: Path, named: str
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    theirs = [tmp_path / "model.safetensors", folder / "model.safetensors"]
    theirs += [folder / "surgery-000000000000.safetensors"]
    for path in theirs:
        path.write_bytes(b"weights")
    text = "{" if FOREIGN[named] is None else json.dumps(FOREIGN[named])
    (folder / "surgery.json").write_text(text)
    surgery.save(model, folder)
    assert all(path.read_bytes() == b"weights" for path in theirs)
    surgery.load(build("gpt2"), folder)


def test_weights_that_a_description_names_by_their_own_digest_stay(
    model: Any, tmp_path: Path
) -> None:
    theirs = tmp_path / "model.safetensors"
    theirs.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    text = json.dumps({"tensors": "model.safetensors", "sha256": digest})
    (tmp_path / "surgery.json").write_text(text)
    surgery.save(model, tmp_path)
    assert theirs.exists()


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("step", range(3))
def test_a_full_disk_is_an_error_that_names_the_folder(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, step: int
) -> None:
    folder = surgery.save(model, tmp_path / "adapter")
    before = files(folder)
    perturb(model, seed=8)
    done, count = getattr(os, call), iter(range(9))

    def fails(*given: Any) -> None:
        if next(count) == step:
            raise OSError(errno.ENOSPC, "No space left on device")
        done(*given)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        if call == "replace" and step == 2:  # there are two renames
            surgery.save(model, folder)
            return
        with pytest.raises(surgery.StoreError, match=rf"{folder}.*No space left on device.*before"):
            surgery.save(model, folder)
    assert files(folder) == before


def test_a_file_that_may_not_grow_leaves_the_old_adapter(model: Any, tmp_path: Path) -> None:
    folder = surgery.save(model, tmp_path / "adapter")
    before = files(folder)
    perturb(model, seed=8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(surgery.StoreError, match="File too large"):
            surgery.save(model, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(folder) == before


@pytest.mark.parametrize("place", ["adapter", "adapter/surgery.json", "adapter/{tensors}"])
def test_what_stands_in_the_way_is_named(model: Any, tmp_path: Path, place: str) -> None:
    (tensors,) = surgery.save(model, tmp_path / "other").glob("*.safetensors")
    folder = tmp_path / "adapter"
    if place == "adapter":
        folder.write_text("a file")
    else:
        (tmp_path / place.format(tensors=tensors.name)).mkdir(parents=True)
    with pytest.raises(surgery.StoreError, match=rf"{folder}.* cannot be written"):
        surgery.save(model, folder)
    assert not list(tmp_path.rglob(".surgery*"))


@pytest.mark.parametrize("renames", range(3))
def test_the_next_save_sweeps_what_a_killed_one_has_left(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    folder = surgery.save(model, tmp_path / "adapter")
    (folder / "surgery.json0123abcd.tmp").write_text("of an earlier version")
    (folder / "notes.tmp").write_text("somebody's")
    perturb(model, seed=8)
    replace, count = os.replace, iter(range(9))

    def killed(*given: Any) -> None:
        if next(count) == renames:
            raise KeyboardInterrupt
        replace(*given)

    with monkeypatch.context() as patch:  # a process that is killed cleans up nothing
        patch.setattr(os, "replace", killed)
        patch.setattr(atomic_write, "unlink", lambda path: None)
        if renames < 2:
            with pytest.raises(KeyboardInterrupt):
                surgery.save(model, folder)
        else:
            surgery.save(model, folder)
    assert len(files(folder)) > 4
    read(folder)
    perturb(model, seed=9)
    surgery.save(model, folder)
    description, _ = read(folder)
    assert files(folder).keys() == {"surgery.json", description["tensors"], "notes.tmp"}


def test_a_reader_finds_an_adapter_although_a_save_comes_between(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = surgery.save(model, tmp_path / "adapter")
    from surgery.adapter import reading

    whole, seeds = reading._tensors, iter(range(4))

    def late(*given: Any) -> Any:
        if (seed := next(seeds)) < 3:
            perturb(model, seed=seed)
            surgery.save(model, folder)
        return whole(*given)

    monkeypatch.setattr(reading, "_tensors", late)
    description, tensors = read(folder)
    own = dict(surgery.spliced_parameters(model))
    assert description["tensors"] in files(folder)
    assert all(torch.equal(tensors[f"inserted.{name}"], own[name]) for name in own)


def test_a_save_that_had_to_wait_tells_what_it_has_replaced(model: Any, tmp_path: Path) -> None:
    folder = surgery.save(model, tmp_path / "adapter")
    perturb(model, seed=8)
    told: list[Any] = []

    def second() -> None:
        try:
            surgery.save(model, folder)
        except UserWarning as warning:  # a warning is an error here
            told.append(str(warning))

    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)  # as another save
    thread = threading.Thread(target=second)
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    os.close(handle)
    thread.join()
    assert "another save" in told[0]
    assert str(folder) in told[0]
    own, (_, tensors) = dict(surgery.spliced_parameters(model)), read(folder)
    assert all(torch.equal(tensors[f"inserted.{name}"], own[name]) for name in own)


def test_a_save_that_waits_too_long_writes_nothing(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = surgery.save(model, tmp_path / "adapter")
    before = files(folder)
    perturb(model, seed=8)
    monkeypatch.setattr(atomic_write, "PATIENCE", 0.05)
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(surgery.StoreError, match=f"{folder}: another save"):
        surgery.save(model, folder)
    os.close(handle)
    assert files(folder) == before
