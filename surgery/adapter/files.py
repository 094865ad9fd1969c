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
        if description["format"] != FORMAT:
            raise StoreError(
                f"{path} has format {description['format']}, this surgery reads {FORMAT}. Install "
                f"the version {description.get('versions', {}).get('surgery')} that wrote it."
            )
        file, digest = description["tensors"], description["sha256"]
        whole = _whole(description)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} is damaged ({error!r}). Save the adapter again.") from error
    if not whole:
        raise StoreError(f"{path} is damaged: a value is of the wrong kind. Save again.")
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
        found = load_tensors(data)
    except SafetensorError as error:
        raise StoreError(f"{tensors} is damaged ({error}).") from error
    named = {f"kept.{n}" for n in description["kept"]} | {f"rows.{n}" for n in description["rows"]}
    if named != {name for name in found if not name.startswith("inserted.")}:
        raise StoreError(f"{path} is damaged: {file} holds other tensors of the base than it says.")
    return description, found


def _whole(description: dict[str, Any]) -> bool:
    """Has a description all that ``load`` reads, each of its kind? Raises what is not there."""
    splices, rows = description["splices"], description.setdefault("rows", {})
    names = [description["kept"], *(saved["modules"] for saved in splices)]
    methods = [m for saved in splices for m in saved["methods"]]
    sites = [site for saved in splices for site in saved["sites"]]
    texts = [saved["name"] for saved in splices] + [m["name"] for m in methods]
    texts += [text for each in names for text in each]
    texts += [site[part] for site in sites for part in ("path", "key", "kind")]
    numbers = [number for each in rows.values() for number in each]
    lists = [splices, *names, *rows.values(), *(saved["methods"] for saved in splices)]
    return (
        all(isinstance(x, list) for x in lists)
        and all(isinstance(x, str) for x in texts)
        and all(type(x) is int and x >= 0 for x in numbers)
        and all(isinstance(m["options"], dict) for m in methods)
        and "fingerprint" in description["base"]
        and Path(description["tensors"]).name == description["tensors"]
    )


def file_of(folder: Path) -> str:
    """The tensors that an adapter in this folder has now; the empty string if there is none."""
    try:
        name = json.loads((folder / JSON).read_bytes())["tensors"]
        return name if isinstance(name, str) and Path(name).name == name else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


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
