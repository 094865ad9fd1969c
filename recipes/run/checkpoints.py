"""Find the checkpoints of a run that were written whole, and drop those that follow one.

A run may be killed while it writes a checkpoint, and a disk may keep a part of a file. A checkpoint
is whole if it has every file that a run is resumed from, and each of them is complete: a JSON file
is read, the members of a zip archive (``torch.save``) have their checksums, and a ``.safetensors``
file has the length that its header says.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

CHECKPOINTS = "checkpoints"
NEEDED = ("trainer_state.json", "optimizer*", "scheduler.pt", "rng_state*", "*.safetensors")
ZIPS = (".pt", ".pth", ".bin")


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of the run in a folder, the newest first, whole or not."""
    found = [p for p in (folder / CHECKPOINTS).glob("checkpoint-*") if p.is_dir() and _step(p) >= 0]
    return sorted(found, key=_step, reverse=True)


def whole_checkpoints(folder: Path) -> Iterator[Path]:
    """The whole checkpoints of the run in a folder, the newest first."""
    return (path for path in checkpoints(folder) if is_whole(path))


def is_whole(checkpoint: Path) -> bool:
    """Whether a run can be resumed from a checkpoint."""
    if not all(any(checkpoint.glob(pattern)) for pattern in NEEDED):
        return False
    try:
        return all(_is_complete(file) for file in checkpoint.rglob("*") if file.is_file())
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile):
        return False


def drop_newer(folder: Path, kept: Path | None) -> None:
    """Remove the checkpoints that are newer than one; all of them if that is None."""
    for path in checkpoints(folder):
        if kept is None or _step(path) > _step(kept):
            shutil.rmtree(path)


def _step(checkpoint: Path) -> int:
    found = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(found[1]) if found else -1


def _is_complete(file: Path) -> bool:
    """Whether a file is complete, as far as its format says.

    Raises:
        OSError, ValueError, SafetensorError, BadZipFile: it is not.
    """
    if file.suffix == ".json":
        return isinstance(json.loads(file.read_bytes()), (dict, list))
    if file.suffix == ".safetensors":
        with safe_open(file, "pt"):
            return True
    if file.suffix in ZIPS:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    return True
