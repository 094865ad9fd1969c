"""Read the files of a saved adapter, checked for damage, while others may save to its folder.

A save replaces surgery.json in one step and then removes the tensors that the one before named. A
reader that comes between finds them gone, and reads surgery.json again. Only plain files are read
(formats/plain_files.py).
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from surgery.adapter.manifest import JSON, LARGEST, parse
from surgery.errors import StoreError, shown
from surgery.formats import contents

_TRIES = 1000  # so many saves may end between the two reads of a load


def read(
    folder: str | os.PathLike[str], at_most: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the description and the tensors of a saved adapter, checked for damage.

    Args:
        folder: the folder of the adapter.
        at_most: how many bytes the file of the tensors may have; None sets no bound.

    Raises:
        StoreError: a file is missing, damaged, of another format, too large or not a plain file.
    """
    path = Path(folder) / JSON
    unchanged = 0
    for _ in range(_TRIES):
        text = contents(path, LARGEST)
        if text is None:
            raise StoreError(
                f"{folder}: no {JSON} here, so surgery.save has saved no adapter there."
            )
        description = parse(text, path)
        try:
            return description, _tensors(Path(folder), description, at_most)
        except StoreError:
            # The same adapter may have been replaced, and saved once more, in between.
            unchanged = unchanged + 1 if contents(path, LARGEST) == text else 0
            if unchanged == 3:
                raise
    raise StoreError(f"{folder}: other saves replace the adapter faster than it can be read.")


def _tensors(
    folder: Path, description: dict[str, Any], at_most: int | None
) -> dict[str, Tensor]:  # fmt: skip
    """Return the tensors that a description names, checked for damage.

    Raises:
        StoreError: the file is missing or damaged, or holds other tensors than the description.
    """
    path = folder / description["tensors"]
    data = contents(path, at_most)
    if data is None:
        raise StoreError(f"{path} is missing. Copy the whole folder, or save again.")
    if hashlib.sha256(data).hexdigest() != description["sha256"]:
        raise StoreError(
            f"{path} is damaged or truncated: the digest of its {len(data):,} bytes is not the "
            f"one in {JSON}. Copy the file again, or save again."
        )
    try:
        found = load_tensors(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise StoreError(f"{path} is damaged ({shown(error)}). Save the adapter again.") from error
    kept, rows = description["kept"], description["rows"]
    named = {f"kept.{name}" for name in kept} | {f"rows.{name}" for name in rows}
    if named != {name for name in found if not name.startswith("inserted.")}:
        raise StoreError(f"{folder / JSON} is damaged: {path.name} holds other base tensors.")
    return found
