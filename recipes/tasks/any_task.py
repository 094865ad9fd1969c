"""The data options that tasks of any data set share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import surgery
from surgery import RecipeError
from surgery_recipes.recipe_files import shown
from surgery_recipes.tasks.split_tables import read_split_tables
from surgery_recipes.tasks.tables import Table


@dataclass(frozen=True)
class AnyData(surgery.Task):
    """Where the rows of any data set come from.

    Attributes:
        path: a CSV, TSV, JSON-lines, JSON or Parquet file, a folder of them, or the id of a data
            set on the hub. One file may have a column ``split`` (train, validation, test).
        config: the configuration of a data set on the hub, such as ``sst2`` of ``nyu-mll/glue``.
        train, validation, test: the file or the split of the hub; "" finds it by its name.
        held_out: the share of training rows, or their number, that is held out for a split that is
            missing. 0 holds out no validation split.
        metrics: the scores, by names of ``surgery_recipes.metrics.by_name``. The first is the main
            one.
    """

    path: str = ""
    config: str = ""
    train: str = ""
    validation: str = ""
    test: str = ""
    held_out: float = 0.1
    metrics: Sequence[str] = ()

    @property
    def metric(self) -> str:  # type: ignore[override]
        """The first of the metrics."""
        return self.metrics[0]

    def tables(self) -> dict[str, Table]:
        """The tables of the splits.

        Raises:
            RecipeError: a file or a split is missing, or a file is damaged.
        """
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return read_split_tables(self.path, named, self.config, self.held_out)

    def check_options(self, *lists: str) -> None:
        """Make tuples of the options that are lists of texts; check them and the number options.

        Raises:
            RecipeError: an option is of another kind.
        """
        for name in lists:
            given: Any = getattr(self, name)
            items = [given] if isinstance(given, str) else given
            if not isinstance(items, (list, tuple)) or not all(_is_plain(item) for item in items):
                raise RecipeError(f"data.{name}={shown(given)} must be a list of texts.")
            object.__setattr__(self, name, tuple(map(str, items)))
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            number = isinstance(given, (int, float)) and not isinstance(given, bool)
            if isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
                whole = isinstance(field.default, int)
                if not number or given < 0 or (whole and not isinstance(given, int)):
                    raise RecipeError(
                        f"data.{field.name}={shown(given)} must be a {'whole ' * whole}number, "
                        "0 or more."
                    )


def _is_plain(item: Any) -> bool:
    return isinstance(item, (str, int)) and not isinstance(item, bool)
