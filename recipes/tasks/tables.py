"""Read the examples of any task as tables: CSV, TSV, JSON lines, JSON or Parquet files, or the hub.

A table is a list of numbered rows, each a mapping of columns to values. The file and the number of
a row begin the message of whatever is wrong with it. CSV and JSON need no package; Parquet needs
``pyarrow``, the hub ``datasets``.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery import RecipeError, suggest
from surgery_recipes.recipe_files import reason, shown
from surgery_recipes.tasks.data_files import read_text

TEXTS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")  # each of them may be gzipped
ENDINGS = (*TEXTS, ".parquet")
LONGEST = 2**27  # characters of one field of a CSV file


@dataclass(frozen=True)
class Table:
    """Rows of one split.

    Attributes:
        source: the file, or the hub id and the split.
        rows: pairs of the number of a row in its file, from 1, and the row.
        columns: the names of the columns, in their order.
        classes: the names of the classes of a column, where a data set of the hub says them.
    """

    source: str
    rows: list[tuple[int, dict[str, Any]]]
    columns: tuple[str, ...]
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        return ((f"{self.source}: row {number}", row) for number, row in self.rows)

    def require(self, columns: Iterable[str], option: str) -> None:
        """Raise a RecipeError unless every column is there; ``option`` is what names them."""
        for column in columns:
            if column not in self.columns:
                raise RecipeError(
                    f"{self.source}: no column {shown(column)}. {suggest(column, self.columns)}"
                    f"Columns: {shown(', '.join(self.columns))[1:-1]}. Set data.{option}."
                )


def is_table(path: str | Path) -> bool:
    """Whether the name of a file ends as that of a table does."""
    name = str(path).lower().removesuffix(".gz")
    return name.endswith(ENDINGS)


def read_table(file: Path) -> Table:
    """The table in a file, of the kind that its name ends in.

    Raises:
        RecipeError: there is no such file, it is of another kind or damaged, or it has no rows.
    """
    kind = Path(file.name.lower().removesuffix(".gz")).suffix
    if kind not in ENDINGS:
        raise RecipeError(
            f"{file}: a file that ends in {shown(kind)} cannot be read. Save it as one that ends "
            f"in {', '.join(ENDINGS)}; the texts may be gzipped."
        )
    if kind == ".parquet":
        rows = _parquet(file)
    elif kind in (".csv", ".tsv"):
        rows = _separated(file, read_text(file), kind)
    else:
        rows = _json(file, read_text(file), kind)
    if not rows:
        raise RecipeError(f"{file}: no rows in it.")
    columns: dict[str, None] = {}
    for number, row in rows:
        if not isinstance(row, dict):
            raise RecipeError(
                f"{file}: row {number} is {shown(row)}. Each must be an object with columns by "
                'name, such as {"text": "fine", "label": 1}.'
            )
        columns |= dict.fromkeys(row)
    return Table(str(file), rows, tuple(columns))


def read_hub_tables(name: str, config: str) -> dict[str, Table]:
    """The splits of a data set on the Hugging Face hub, through ``datasets``.

    Raises:
        RecipeError: ``datasets`` is not installed, or the data set cannot be downloaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise RecipeError(
            f"data.path={shown(name)} is a data set of the hub. pip install 'surgery[hf]', or give "
            "a local file."
        ) from error
    try:
        sets = datasets.load_dataset(name, config or None)
    except Exception as error:  # of many kinds, from the network, the hub and the file formats
        raise RecipeError(
            f"data.path={shown(name)} is no file or folder here, and cannot be downloaded from the "
            f"hub: {reason(error)}. Correct the name, set data.config if it has several "
            "configurations, or give a local file."
        ) from error
    return {
        split: Table(
            f"{name} {split}",
            list(enumerate(rows, start=1)),
            tuple(rows.column_names),
            {
                column: tuple(kind.names)
                for column, kind in rows.features.items()
                if isinstance(kind, datasets.ClassLabel)
            },
        )
        for split, rows in sets.items()
    }


def _separated(file: Path, text: str, kind: str) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a CSV file, or of a TSV file, in which quotes are letters as any other."""
    options: dict[str, Any] = {"strict": True}
    if kind == ".tsv":
        options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    before = csv.field_size_limit(LONGEST)
    rows: list[tuple[int, dict[str, Any]]] = []
    try:
        reader = csv.reader(io.StringIO(text, newline=""), **options)
        names = next(reader, [])
        _check_header(file, names)
        for cells in filter(None, reader):
            number = len(rows) + 1
            if len(cells) != len(names):
                raise RecipeError(
                    f"{file}: row {number} (line {reader.line_num}) has {len(cells)} cells, but "
                    f"the header names {len(names)} columns. Correct the row; in CSV, put quotes "
                    "around a cell with a comma or a line break."
                )
            rows.append((number, dict(zip(names, cells, strict=True))))
    except csv.Error as error:
        raise RecipeError(
            f"{file}: row {len(rows) + 1} cannot be read: {error}. Correct the row."
        ) from error
    finally:
        csv.field_size_limit(before)
    return rows


def _check_header(file: Path, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise RecipeError(
            f"{file}: two columns have the name {shown(twice[0])}. The first line must name each "
            "column once."
        )


def _json(file: Path, text: str, kind: str) -> list[tuple[int, Any]]:
    """The objects of a JSON-lines file, or of a JSON file that is a list of them."""
    if kind == ".json":
        try:
            content = json.loads(text)
        except ValueError as error:
            raise RecipeError(f"{file}: this is not JSON: {error}.") from error
        if not isinstance(content, list):
            raise RecipeError(
                f"{file}: a JSON file must be a list of objects with columns by name. Save other "
                "layouts as JSON lines."
            )
        return list(enumerate(content, start=1))
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except ValueError as error:
                raise RecipeError(f"{file}: line {number} is not JSON: {error}.") from error
    return rows


def _parquet(file: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise RecipeError(
            f"{file}: Parquet is read with pyarrow. pip install 'surgery[hf]', or save the file as "
            "CSV or JSON lines."
        ) from error
    if not file.is_file():
        raise RecipeError(f"{file}: no such data file.")
    try:
        return list(enumerate(parquet.read_table(file).to_pylist(), start=1))
    except (ArrowException, OSError) as error:
        raise RecipeError(f"{file} cannot be read as Parquet: {reason(error)}.") from error
