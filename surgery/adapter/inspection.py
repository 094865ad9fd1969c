"""Show what a saved adapter holds, without a base."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.adapter.downloading import local_folder
from surgery.adapter.reading import read
from surgery.errors import printable
from surgery.formats import ForeignContents, foreign_contents, read_foreign

_AT_MOST = 16 << 30  # bytes that are downloaded of an adapter for a base that is not known yet


@dataclass(frozen=True)
class SavedSplice:
    """A splice of a saved adapter: its name, its methods with options, sites by kind, modules.

    Without its base, the sites of an adapter of PEFT are not known: ``sites`` counts its modules.
    """

    name: str
    methods: tuple[str, ...]
    sites: dict[str, int]
    modules: int

    @property
    def places(self) -> str:
        """Its sites in words, such as ``12 attention, 12 ffn``."""
        return ", ".join(f"{count:,} {kind}" for kind, count in self.sites.items())


@dataclass(frozen=True)
class SavedAdapter:
    """What a saved adapter holds. Print it.

    Attributes:
        folder: the folder on this machine.
        base: the class of its base, or the class of transformers that loads it; ``base_name`` is
            the name or folder that it was loaded from.
        splices: the splices, in order.
        numbers, size: how many numbers it holds, and in how many bytes.
        kept, rows: parameters of the base that were trained along, and how many rows of others.
        versions: of surgery and torch, as they wrote it.

    Example:
        ``print(surgery.inspect("adapter"))``
    """

    folder: Path
    base: str
    base_name: str | None
    splices: tuple[SavedSplice, ...]
    numbers: int
    size: int
    kept: tuple[str, ...]
    rows: dict[str, int]
    versions: dict[str, str]

    def __repr__(self) -> str:
        lines = [f"{self.folder}", f"  base      {self.base} {self.base_name or ''}".rstrip()]
        for splice in self.splices:
            at = f", at {splice.places} sites" if splice.sites else ""
            lines.append(f"  splice    {splice.name}{at}")
            lines += [f"            {method}" for method in splice.methods]
        lines.append(f"  holds     {self.numbers:,} numbers in {self.size:,} bytes")
        if self.kept:
            lines.append(f"  replaces  {', '.join(self.kept)}")
        lines += [f"  rows      {count:,} of {name}" for name, count in self.rows.items()]
        by = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines += [f"  saved by  {by}"] if by else []
        return "\n".join(map(printable, lines))


def inspect(
    place: str | os.PathLike[str], revision: str | None = None, subfolder: str = ""
) -> SavedAdapter:
    """Return what a saved adapter holds, checked for damage; no base is needed.

    Args:
        place: a folder, or ``OWNER/NAME`` on the Hugging Face hub; of an adapter that surgery or
            PEFT has saved.
        revision, subfolder: as for :func:`surgery.load`.

    Raises:
        StoreError: there is no adapter, or it is damaged.

    Example:
        ``print(surgery.inspect("adapter"))``
    """
    folder = local_folder(place, _AT_MOST, revision, subfolder)
    foreign = read_foreign(folder, _AT_MOST)
    if foreign is not None:
        numbers = sum(tensor.numel() for tensor in foreign.tensors.values())
        size = sum(tensor.nbytes for tensor in foreign.tensors.values())
        return _of_foreign(folder, foreign_contents(foreign), numbers, size)
    description, tensors = read(folder, _AT_MOST)
    base, found = description["base"], description.get("versions")
    versions = found if isinstance(found, dict) else {}
    name = base.get("name")
    return SavedAdapter(
        folder=folder,
        base=_text(base.get("class", "a model")),
        base_name=_text(name) if isinstance(name, str) else None,
        splices=tuple(map(_splice, description["splices"])),
        numbers=sum(tensor.numel() for tensor in tensors.values()),
        size=sum(tensor.nbytes for tensor in tensors.values()),
        kept=tuple(description["kept"]),
        rows={name: len(rows) for name, rows in description["rows"].items()},
        versions={_text(k): _text(v) for k, v in versions.items()},
    )


def _of_foreign(folder: Path, found: ForeignContents, numbers: int, size: int) -> SavedAdapter:
    sites = {"module": len(found.modules)} if found.modules else {}
    splice = SavedSplice("default", (_text(found.method),), sites, len(found.modules))
    return SavedAdapter(
        folder=folder,
        base=found.base,
        base_name=None if found.base_name is None else _text(found.base_name),
        splices=(splice,),
        numbers=numbers,
        size=size,
        kept=found.kept,
        rows=found.rows,
        versions={name: _text(version) for name, version in found.versions.items()},
    )


def _splice(saved: dict[str, Any]) -> SavedSplice:
    kinds = Counter(site["kind"] for site in saved["sites"])
    methods = tuple(map(_call, saved["methods"]))
    return SavedSplice(saved["name"], methods, dict(kinds), len(saved["modules"]))


def _call(method: dict[str, Any]) -> str:
    """Return how a method is made: ``lora(rank=8, ...)``."""
    options = ", ".join(f"{name}={value!r}" for name, value in method["options"].items())
    return f"{method['name']}({options})"


def _text(value: Any) -> str:
    """Return a value that no check has bounded as one short line."""
    return printable(" ".join(str(value).split())[:200])
