"""Classify: assign a class to the texts of any data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import surgery
from surgery import Example, RecipeError, suggest
from surgery_recipes.metrics import by_name
from surgery_recipes.recipe_files import shown
from surgery_recipes.tasks.any_task import AnyData
from surgery_recipes.tasks.classification import Classification, labelled
from surgery_recipes.tasks.tables import Table

MANY = 20  # classes; from here on a column with more classes than half its rows holds no classes


@dataclass(frozen=True)
class Classify(AnyData, Classification):
    """Classes of one text, or of a pair of texts, by columns of a table.

    Attributes:
        text: the column of the text.
        texts: the columns of a pair of texts, in place of ``text``.
        label: the column of the class: its name, or its number from 0.
        labels: the names of the classes, in the order of their numbers. Without them they are those
            that the data set of the hub says, or the values of the training rows in their order.
    """

    name: ClassVar[str] = "classify"

    text: str = "text"
    texts: Sequence[str] = ()
    label: str = "label"
    labels: Sequence[str] = ()  # type: ignore[assignment]
    metrics: Sequence[str] = ("accuracy",)

    def __post_init__(self) -> None:
        self.check_options("texts", "labels", "metrics")
        super().__post_init__()
        by_name.check_names(self.metrics, by_name.CLASS_SCORES, "task 'classify'")
        if len(self.texts) > 2:
            raise RecipeError(f"data.texts={shown(list(self.texts))} must be one column or two.")
        if len(set(self.labels)) < len(self.labels) or len(self.labels) == 1:
            raise RecipeError(
                f"data.labels={shown(list(self.labels))} must name two classes or more, each once."
            )

    def splits(self) -> dict[str, list[Example]]:
        tables = self.tables()
        columns = self.texts or (self.text,)
        for table in tables.values():
            table.require(columns, "texts" if self.texts else "text")
            table.require([self.label], "label")
        if not self.labels:  # from now on they are known: a head of their number is made next
            object.__setattr__(self, "labels", self._found(tables["train"]))
        if len(self.labels) != 2:
            for name in {"f1", "precision", "recall"} & set(self.metrics):
                raise RecipeError(
                    f"metric {name!r} is of two classes, and there are {len(self.labels)}. Take "
                    f"{name}_macro, {name}_micro or {name}_weighted."
                )
        return {
            split: [
                labelled(
                    [_text(row.get(column)) for column in columns], self._number(row, where), where
                )
                for where, row in table
            ]
            for split, table in tables.items()
        }

    def score(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, float]:
        right = [example["label"] for example in examples]
        return by_name.class_scores(self.metrics, answers, right)

    def _found(self, table: Table) -> tuple[str, ...]:
        """The classes that the data set says, or those of the training rows."""
        if self.label in table.classes:
            return table.classes[self.label]
        values = {_class(row.get(self.label), where) for where, row in table}
        if len(values) < 2 or (len(values) > MANY and 2 * len(values) > len(table.rows)):
            raise RecipeError(
                f"{table.source}: column {self.label!r} has {len(values)} different values in "
                f"{len(table.rows)} training rows, which are no classes. Set data.label to another "
                "column, or name the classes in data.labels."
            )
        numbers = all(value.removeprefix("-").isdecimal() for value in values)
        return tuple(sorted(values, key=int if numbers else str))

    def _number(self, row: dict[str, Any], where: str) -> int:
        name = _class(row.get(self.label), where)
        if name in self.labels:
            return list(self.labels).index(name)
        if name.isdecimal() and int(name) < len(self.labels):
            return int(name)
        raise RecipeError(
            f"{where}: label {shown(name)} is none of the classes. {suggest(name, self.labels)}"
            f"Classes: {shown(', '.join(self.labels))[1:-1]}. Correct or remove the row, or add it "
            "to data.labels."
        )


def _class(value: Any, where: str) -> str:
    """The name of a class: 1 and 1.0 are the same, and so are ``true`` and True."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (int, str)) and str(value).strip():
        return str(value).strip()
    raise RecipeError(f"{where}: label {shown(value)} is no class. Correct or remove the row.")


def _text(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


@surgery.hookimpl
def register_tasks(register: surgery.RegisterTask) -> None:
    register(Classify)
