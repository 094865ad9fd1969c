"""Find, download and read the official files of a data set.

Files are JSON, JSON lines or TSV, and each may be gzipped.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import http.client
import io
import json
import os
import tempfile
import urllib.request
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from surgery import RecipeError

DATA = "SURGERY_DATA"
TIMEOUT = 60.0  # seconds without an answer before a download is given up


def data_folder(path: str, name: str) -> Path | None:
    """The folder of a data set, or None if it is to be downloaded.

    Args:
        path: the folder, or one that holds several data sets, each below its name. With "" it is
            the folder of $SURGERY_DATA, if that holds this data set.
        name: the name of the data set.

    Raises:
        RecipeError: a path is given, and no folder is there.
    """
    if path:
        folder = Path(path)
        if not folder.is_dir():
            raise RecipeError(
                f"data path {path}: no such folder. Give the folder with the files of {name}, or "
                f"leave data.path out to take them from ${DATA} or the web."
            )
        return folder / name if (folder / name).is_dir() else folder
    root = os.environ.get(DATA)
    folder = Path(root or ".") / name
    return folder if root and folder.is_dir() else None


def find_file(
    folder: Path, stems: Sequence[str], endings: Sequence[str] = (".jsonl", ".tsv")
) -> Path:
    """The file of ``folder`` whose name begins with a stem and has one of the endings.

    Stems are tried in order, and the first with a file wins. ``.gz`` may follow an ending.

    Raises:
        RecipeError: no file has such a name, or several have.
    """
    for stem in stems:
        patterns = [f"{stem}*{end}{zipped}" for end in endings for zipped in ("", ".gz")]
        found = sorted(path for pattern in patterns for path in folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(path.name for path in found)
            raise RecipeError(
                f"{folder}: {names} all begin with {stem!r}. Leave one of them there."
            )
    here = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    wished = " or ".join(f"{stem}*" for stem in stems)
    raise RecipeError(
        f"{folder}: no {wished} with {', '.join(endings)}, gzipped or not. Here: {here}."
    )


def read_text(path: Path) -> str:
    """The text of a file, unzipped if its name ends in ``.gz``.

    Raises:
        RecipeError: there is no such file, or it is damaged.
    """
    if not path.is_file():
        raise RecipeError(f"{path}: no such data file.")
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise RecipeError(f"{path} cannot be read: {error}. Download it again.") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        RecipeError: there is no such file, or it is not JSON.
    """
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise RecipeError(f"{path}: this is not JSON: {error}.") from error


def read_rows(path: Path, columns: Iterable[str]) -> list[dict[str, Any]]:
    """The rows of a TSV file with a header, or of a JSON-lines file, each with these columns.

    Raises:
        RecipeError: a row lacks a column, a line cannot be read, or there are no rows.
    """
    text = read_text(path)
    if ".tsv" in path.suffixes:
        reader = csv.DictReader(
            io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE
        )
        rows = list(reader)
        names: Sequence[str] = reader.fieldnames or []
    else:
        lines = [line for line in text.split("\n") if line.strip()]
        try:
            rows = [json.loads(line) for line in lines]
        except ValueError as error:
            raise RecipeError(f"{path}: a line is not JSON: {error}.") from error
        if not all(isinstance(row, dict) for row in rows):
            raise RecipeError(f"{path}: each line must be a JSON object with columns by name.")
        names = list(rows[0]) if rows else []
    if not rows:
        raise RecipeError(f"{path}: no rows in it.")
    require_columns(names, columns, str(path))
    for number, row in enumerate(rows):
        for column in columns:
            if row.get(column) is None:
                raise RecipeError(f"{path}: row {number + 1} has no {column!r}.")
    return rows


def require_columns(names: Sequence[str], columns: Iterable[str], where: str) -> None:
    """Raise a RecipeError, which begins with ``where``, unless every column is among ``names``."""
    for column in columns:
        if column not in names:
            raise RecipeError(f"{where}: no column {column!r}. Columns: {', '.join(names)}.")


def download(url: str, sha256: str) -> Path:
    """A file of the web, downloaded once and kept below ``~/.cache/surgery``.

    $XDG_CACHE_HOME replaces ``~/.cache``. The file appears there whole or not at all, even if
    several processes download it at the same time. Proxies are those of the environment.

    Raises:
        RecipeError: the download fails, or the file does not have this digest.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "surgery"
    kept = cache / sha256 / url.rpartition("/")[2]
    if kept.is_file():
        return kept
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            content = answer.read()
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            raise OSError(f"its {len(content)} bytes have the SHA-256 {found}, not {sha256}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            part = Path(folder) / kept.name
            part.write_bytes(content)
            part.replace(kept)
    except (OSError, http.client.HTTPException) as error:
        raise RecipeError(
            f"{url} cannot be downloaded: {error!r}. Give local files with data=PATH, or "
            f"a folder of all data sets in ${DATA}."
        ) from error
    return kept


def read_hub(name: str, split: str) -> list[dict[str, Any]]:
    """The rows of one split of a data set on the Hugging Face hub, through ``datasets``.

    Raises:
        RecipeError: the data set cannot be downloaded.
    """
    import datasets

    try:
        return list(datasets.load_dataset(name, split=split))
    except Exception as error:  # of many kinds, from the network, the hub and the file formats
        raise RecipeError(
            f"{name} ({split}) cannot be downloaded from the hub: {error}. Give local files with "
            f"data=PATH, or a folder of all data sets in ${DATA}."
        ) from error
