"""Write the files of an adapter in one step, beside whatever else is in the folder.

    lock the folder                     other saves wait
    sweep                               what a killed save has left
    stage .surgery-*.tmp                the description before, the new one, the new tensors
    rename the tensors                  no reader knows of them
    rename surgery.json                 the step: readers find the old adapter or the new one
    remove                              the tensors that surgery.json does not name, staged files

Only tensors are removed that a description names, by a name and a digest that are those of the
file. A staged description therefore tells the next save what is to be swept, and goes last.
The lock is that of ``flock`` on the folder itself, so it leaves no file and ends with its process.
Where a file system has none, nothing orders two saves, and nothing is swept.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from surgery.adapter.manifest import JSON, LARGEST, is_name_of
from surgery.errors import StoreError
from surgery.formats import contents

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PATIENCE = 120.0  # seconds that a save waits for another
_STAGED = re.compile(
    r"\.surgery-[0-9a-f]{16}\.tmp"
    r"|(surgery\.json|surgery-[0-9a-f]{12}\.safetensors)[a-z0-9_]{8}\.tmp"  # of earlier versions
)


def write(folder: Path, file: str, data: bytes, text: bytes) -> bool:
    """Replace the adapter in a folder: ``data`` under the name ``file``, described by ``text``.

    Returns:
        whether another save to the folder was under way, and its adapter has been replaced.

    Raises:
        StoreError: another save does not end, or a file cannot be written. The adapter that was
            there is whole.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder) as (waited, alone):
            if alone:
                _sweep(folder)
            before = _described(folder / JSON)
            _replace(folder, file, data, text, before)
            return waited and before not in (b"", text)
    except OSError as error:
        raise StoreError(
            f"{error.filename or folder} cannot be written ({error.strerror or error}). The "
            f"adapter that was in {folder} is there as before. Make room, or choose a folder that "
            "you may write to."
        ) from error


def _replace(folder: Path, file: str, data: bytes, text: bytes, before: bytes) -> None:
    """Stage and rename; whatever happens, leave only what surgery.json names then."""
    staged = [folder / f".surgery-{secrets.token_hex(8)}.tmp" for _ in range(3)]
    try:
        for path, content in zip(staged, (before, text, data), strict=True):
            put(path, content)
        os.replace(staged[2], folder / file)
        sync(folder)
        os.replace(staged[1], folder / JSON)
        sync(folder)
    finally:
        for each in (before, text):
            _remove_tensors(folder, each)
        for path in reversed(staged):
            unlink(path)


def put(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the disk. Its mode is that of any new file."""
    with open(path, "xb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def sync(folder: Path) -> None:
    """Wait until renames in a folder are on the disk, where the system can say so."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _described(path: Path) -> bytes:
    """Return the bytes of a description; b"" if there is none, or none that can be read."""
    try:
        return contents(path, LARGEST) or b""
    except StoreError:
        return b""


def _file_of(description: bytes) -> tuple[str, str]:
    """Return the file of tensors that a description names as its own, and its digest."""
    try:
        found: Any = json.loads(description)
        file, digest = found["tensors"], found["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "", ""
    own = is_name_of(file, digest) and re.fullmatch(r"[0-9a-f]{64}", digest)
    return (file, digest) if own else ("", "")


def _remove_tensors(folder: Path, description: bytes) -> None:
    """Remove the tensors that a description names as its own, unless surgery.json names them."""
    file, digest = _file_of(description)
    with contextlib.suppress(StoreError):  # what cannot be read stays
        if not file or file == _file_of(contents(folder / JSON, LARGEST) or b"")[0]:
            return
        data = contents(folder / file)
        if data is not None and hashlib.sha256(data).hexdigest() == digest:
            unlink(folder / file)


def _sweep(folder: Path) -> None:
    """Remove what saves have left that were killed; the folder is locked, so none is running."""
    for path in folder.iterdir():
        if _STAGED.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            _remove_tensors(folder, _described(path))
            unlink(path)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[tuple[bool, bool]]:
    """Lock a folder against other saves; yield whether one was waited for, and if locks work.

    Raises:
        StoreError: another save holds the lock for longer than ``PATIENCE``.
    """
    if fcntl is None:
        yield False, False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        start, waited = time.monotonic(), False
        while (works := _lock(handle)) is None:
            waited = True
            if time.monotonic() - start > PATIENCE:
                raise StoreError(
                    f"{folder}: another save has been under way for {PATIENCE:.0f} seconds. Wait "
                    "for it, end its process, or save to another folder. Nothing was written."
                )
            time.sleep(0.005)
        yield waited, works
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # also for a child that has inherited the handle
        os.close(handle)


def _lock(handle: int) -> bool | None:
    """Whether the folder is locked now; None while another save has it, False without locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return None if error.errno in (errno.EAGAIN, errno.EACCES) else False
    return True
