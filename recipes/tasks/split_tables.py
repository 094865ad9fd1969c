"""Find the splits of a data set that a recipe names: in a file, in a folder, or on the hub.

    a file      with a column ``split``, or training rows alone
    a folder    train*, validation* (or valid*, dev*) and test*, or files that the recipe names
    owner/name  the splits of a data set on the hub

A split that is missing is held out of the training rows, always the same way. Where there is a
validation split and no test split, the validation split is scored.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Mapping
from pathlib import Path

from surgery import RecipeError, suggest
from surgery_recipes.recipe_files import shown
from surgery_recipes.tasks.data_files import find_file
from surgery_recipes.tasks.tables import (
    ENDINGS,
    Table,
    is_table,
    read_hub_tables,
    read_table,
)

STEMS = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}
COLUMN = "split"
HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")


def read_split_tables(
    path: str, named: Mapping[str, str], config: str, held_out: float
) -> dict[str, Table]:
    """The tables ``train``, ``validation`` and ``test``; no ``validation`` if none is held out.

    Args:
        path: a file, a folder, or the id of a data set on the hub.
        named: by ``train``, ``validation`` and ``test``, the file or the split of the hub that it
            is; "" finds it.
        config: the configuration of a data set on the hub.
        held_out: the share of training rows, or from 1 on their number, that is held out for a
            split that is missing.

    Raises:
        RecipeError: nothing is there, or a split cannot be found or held out.
    """
    place = Path(path)
    if not path:
        raise RecipeError(
            "data.path is missing. Give a CSV, JSON-lines or Parquet file, a folder of them, or "
            "the id of a data set on the hub, such as fancyzhx/ag_news."
        )
    if place.is_file():
        found = _of_a_file(place, named)
    elif place.is_dir():
        found = _of_a_folder(place, named)
    elif is_table(place) or not HUB_ID.fullmatch(path):
        raise RecipeError(
            f"data.path={shown(path)}: no such file or folder, and no id of a data set on the hub, "
            "which is written owner/name."
        )
    else:
        found = _of_the_hub(path, named, config)
    return _complete(found, path, held_out)


def _of_a_file(file: Path, named: Mapping[str, str]) -> dict[str, Table]:
    table = read_table(file)
    others = {split: name for split, name in named.items() if name}
    if others:
        return {"train": table} | {s: read_table(file.parent / n) for s, n in others.items()}
    if COLUMN not in table.columns:
        return {"train": table}
    parts: dict[str, list[tuple[int, dict[str, object]]]] = {}
    aliases = {stem: split for split, stems in STEMS.items() for stem in stems}
    for number, row in table.rows:
        if row.get(COLUMN) not in aliases:
            raise RecipeError(
                f"{file}: row {number}: split {shown(row.get(COLUMN))} must be one of "
                f"{', '.join(aliases)}."
            )
        parts.setdefault(aliases[row[COLUMN]], []).append((number, row))
    return {split: dataclasses.replace(table, rows=rows) for split, rows in parts.items()}


def _of_a_folder(folder: Path, named: Mapping[str, str]) -> dict[str, Table]:
    found = {}
    for split, stems in STEMS.items():
        if named[split]:
            found[split] = read_table(folder / named[split])
        elif split == "train" or any(
            is_table(file) for stem in stems for file in folder.glob(f"{stem}*")
        ):
            found[split] = read_table(find_file(folder, stems, ENDINGS))
    return found


def _of_the_hub(name: str, named: Mapping[str, str], config: str) -> dict[str, Table]:
    there = read_hub_tables(name, config)
    found = {}
    for split in STEMS:
        wanted = named[split] or split
        if wanted in there:
            found[split] = there[wanted]
        elif named[split] or split == "train":
            raise RecipeError(
                f"{name} has no split {shown(wanted)}. {suggest(wanted, there)}Splits: "
                f"{', '.join(there)}. Set data.{split}."
            )
    return found


def _complete(found: dict[str, Table], path: str, held_out: float) -> dict[str, Table]:
    """The three splits, of which missing ones are held out of the training rows."""
    if "train" not in found:
        raise RecipeError(
            f"data.path={shown(path)}: no training rows. Name their file with data.train, or give "
            f"rows the {COLUMN} train."
        )
    if "test" not in found and "validation" in found:
        found = {"train": found["train"], "test": found["validation"]}
    for split in ("test", "validation"):
        if split not in found and (held_out or split == "test"):
            found["train"], found[split] = _held_out(found["train"], held_out, split)
    return {split: found[split] for split in STEMS if split in found}


def _held_out(table: Table, share: float, split: str) -> tuple[Table, Table]:
    count = round(share * len(table.rows)) if share < 1 else int(share)
    count = max(1, count) if share else 0
    if not 0 < count < len(table.rows):
        raise RecipeError(
            f"{table.source}: {count} of {len(table.rows)} rows cannot be held out as the {split} "
            f"split. Change data.held_out, or give the rows with data.{split}."
        )
    drawn = set(random.Random(0).sample(range(len(table.rows)), count))
    parts = (
        [row for i, row in enumerate(table.rows) if (i in drawn) == chosen]
        for chosen in (False, True)
    )
    rest, chosen = (dataclasses.replace(table, rows=rows) for rows in parts)
    return rest, chosen
