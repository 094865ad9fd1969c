"""Read and write the files of a saved adapter; adapter/saving.py has the format.

Reading checks the files for damage before anything is loaded. Writing replaces a file in one step,
so that a reader finds the old file or the new one.
"""

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
    """Return the description and the tensors of a saved adapter, checked for damage.

    Raises:
        StoreError: a file is missing, damaged or of another format.
    """
    path = Path(folder) / JSON
    if not path.is_file():
        raise StoreError(f"{folder}: no {JSON} here, so surgery.save has saved no adapter there.")
    try:
        description = json.loads(path.read_bytes())
        if description["format"] != FORMAT:
            raise StoreError(
                f"{path} has format {description['format']}, this surgery reads {FORMAT}. Install "
                f"the version {description.get('versions', {}).get('surgery')} that wrote it."
            )
        file, digest = description["tensors"], description["sha256"]
        complete = _is_complete(description)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} is damaged ({error!r}). Save the adapter again.") from error
    if not complete:
        raise StoreError(f"{path} is damaged: a value has the wrong type. Save the adapter again.")
    tensors = Path(folder) / file
    if not tensors.is_file():
        raise StoreError(f"{tensors} is missing. Copy the whole folder, or save again.")
    data = tensors.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise StoreError(
            f"{tensors} is damaged or truncated: the digest of its {len(data):,} bytes is not the "
            f"one in {JSON}. Copy the file again, or save again."
        )
    try:
        found = load_tensors(data)
    except SafetensorError as error:
        raise StoreError(f"{tensors} is damaged ({error}). Save the adapter again.") from error
    named = {f"kept.{n}" for n in description["kept"]} | {f"rows.{n}" for n in description["rows"]}
    if named != {name for name in found if not name.startswith("inserted.")}:
        raise StoreError(f"{path} is damaged: {file} holds other base tensors. Save again.")
    return description, found


def _is_complete(description: dict[str, Any]) -> bool:
    """Whether each value of a description that ``load`` reads has the right type.

    Raises:
        KeyError, TypeError, AttributeError: a value is missing, or a container has the wrong type.
    """
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
    """Return the name of the tensor file of the adapter in this folder; '' if there is none."""
    try:
        name = json.loads((folder / JSON).read_bytes())["tensors"]
        return name if isinstance(name, str) and Path(name).name == name else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file in one step: after a crash it is the old file or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # as for any new file; mkstemp allows its owner alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
