"""Adapter files: a saved adapter is read checked for damage, and written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from surgery.errors import StoreError

FORMAT = 1
JSON = "surgery.json"


def read(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of a saved adapter, checked for damage."""
    path = Path(folder) / JSON
    if not path.is_file():
        raise StoreError(f"{folder}: no {JSON} here, so this is no adapter saved by surgery.save.")
    try:
        description = json.loads(path.read_bytes())
        file, digest = description["tensors"], description["sha256"]
        number, _ = description["format"], description["splices"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is damaged ({error}). Save the adapter again.") from error
    if number != FORMAT:
        raise StoreError(
            f"{path} has format {number}, this surgery reads {FORMAT}. Install the version "
            f"{description.get('versions', {}).get('surgery')} that wrote it."
        )
    tensors = Path(folder) / file
    if not tensors.is_file():
        raise StoreError(f"{tensors} is missing. Copy the whole folder, or save again.")
    data = tensors.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise StoreError(
            f"{tensors} is damaged or truncated: {len(data):,} bytes, and not those that {JSON} "
            "was written for. Copy it again, or save again."
        )
    try:
        return description, load_tensors(data)
    except SafetensorError as error:
        raise StoreError(f"{tensors} is damaged ({error}).") from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # as any new file, not for its maker alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
