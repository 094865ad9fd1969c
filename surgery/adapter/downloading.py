"""Find the folder of an adapter: on this machine, or on the Hugging Face hub.

    local_folder(place)     a local folder as it is; else OWNER/NAME, downloaded
      surgery.json          at most as large as one may be; it names one file, the tensors
      the tensors           at most as large as this model allows, from the same commit
      PEFT's two files      likewise, where there is no surgery.json; adapter_model.bin is taken
                            where there is no adapter_model.safetensors

Sizes are asked for before anything is downloaded, and the files are then read as any others are
(adapter/reading.py). A folder on this machine always wins over a name on the hub.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from surgery.adapter.manifest import JSON, LARGEST, parse
from surgery.errors import StoreError, shown
from surgery.formats import CONFIG, PICKLED, TENSORS, contents

REPOSITORY = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)


def local_folder(
    place: str | os.PathLike[str], at_most: int, revision: str | None = None, subfolder: str = ""
) -> Path:
    """Return the folder of an adapter; one on the hub is downloaded to its cache.

    Args:
        place: a folder, or ``OWNER/NAME`` on the hub.
        at_most: how many bytes the file of the tensors may have.
        revision: a branch, tag or commit on the hub; the main branch by default.
        subfolder: the folder in ``place`` that holds the adapter.

    Raises:
        StoreError: there is neither such a folder nor such a repository, or a file is too large.
    """
    if Path(subfolder).is_absolute() or ".." in Path(subfolder).parts:
        raise StoreError(f"subfolder={subfolder!r} leads out of {place}.")
    if os.path.exists(place) or not REPOSITORY.fullmatch(os.fspath(place)):
        return Path(place) / subfolder
    repository = os.fspath(place)
    try:
        described = _download(repository, JSON, LARGEST, revision, subfolder)
    except StoreError as missing:
        return _of_peft(repository, at_most, revision, subfolder, missing)
    folder, commit = described.parent, _commit(described)
    text = contents(described, LARGEST)
    assert text is not None
    _download(repository, parse(text, described)["tensors"], at_most, commit, subfolder)
    return folder


def _of_peft(
    repository: str, at_most: int, revision: str | None, subfolder: str, missing: StoreError
) -> Path:
    """Return the folder of an adapter that PEFT has saved; raise ``missing`` if there is none."""
    try:
        config = _download(repository, CONFIG, LARGEST, revision, subfolder)
    except StoreError:
        raise missing from None
    commit = _commit(config)
    try:
        _download(repository, TENSORS, at_most, commit, subfolder)
    except StoreError as first:
        if first.__cause__ is None:  # it is there, and too large
            raise
        try:
            _download(repository, PICKLED, at_most, commit, subfolder)
        except StoreError as second:
            raise (first if second.__cause__ else second) from None
    return config.parent


def _download(
    repository: str, file: str, at_most: int, revision: str | None, subfolder: str
) -> Path:  # fmt: skip
    """Return the path of a file of a repository in the hub's cache."""
    hub = hub_library(f"no folder {repository} is here, and reading from the hub")
    where = {"subfolder": subfolder or None, "revision": revision}
    try:
        size = hub.get_hf_file_metadata(hub.hf_hub_url(repository, file, **where)).size
    except Exception:  # offline, say: the cache may have it, and an error comes from there
        size = None
    if size is not None and size > at_most:
        raise StoreError(
            f"{repository}: {file} has {size:,} bytes on the hub, more than the {at_most:,} that "
            "it may have. Nothing was downloaded."
        )
    try:
        return Path(hub.hf_hub_download(repository, file, library_name="surgery", **where))
    except Exception as error:
        raise StoreError(
            f"{repository}: no such folder is here, and {file} cannot be downloaded from the hub "
            f"({shown(error)}). Check the name, revision= and subfolder=; a private repository "
            "needs `hf auth login`."
        ) from error


def _commit(path: Path) -> str:
    """Return the commit of a file in the hub's cache: ``.../snapshots/COMMIT/...``."""
    parts = path.parts
    return parts[len(parts) - parts[::-1].index("snapshots")]


def hub_library(what: str) -> Any:
    """Import huggingface_hub and return it."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise StoreError(f"{what} needs huggingface_hub. pip install 'surgery[hf]'") from error
    return huggingface_hub
