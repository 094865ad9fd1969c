"""Read ``sweep`` and ``budget`` of a grid: how learning rates and sizes of its rows are chosen.

sweep: {rates: [1e-4, 1e-3, 1e-2], steps: 100, seeds: [1], halving: 2}
sweep: {low: 1e-5, high: 1e-1, points: 9, steps: 100, set: [limit.validation=200]}
budget: 0.5 % stored
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from surgery import RecipeError, suggest
from surgery_recipes.recipe_files import shown

KEYS = ("rates", "low", "high", "points", "steps", "seeds", "halving", "set", "rows")
FIXED = ("training.learning_rate", "training.max_steps", "training.seed", "output", "validate_only")


@dataclass(frozen=True)
class Sweep:
    """A search for the learning rate of each row, with the same budget for all rows.

    Attributes:
        rates: the rates to try, ascending.
        steps: the training steps of the longest trials.
        seeds: the seeds of each trial; the mean of their scores decides.
        halving: after each round the best 1 / halving of the rates go on, with halving times as
            many steps, which end at ``steps``. 1 gives every rate all steps.
        set: ``key=value`` overrides for the trials alone.
        rows: other rates for some rows, as many as ``rates`` has.
    """

    rates: tuple[float, ...]
    steps: int
    seeds: tuple[int, ...] = (1,)
    halving: int = 1
    set: tuple[str, ...] = ()
    rows: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def rates_of(self, row: str) -> tuple[float, ...]:
        """The rates that are tried for a row."""
        return self.rows.get(row, self.rates)

    @property
    def rounds(self) -> list[tuple[int, int]]:
        """For each round, how many rates it has and how many steps each of them trains."""
        counts = [len(self.rates)]
        while 1 < self.halving < counts[-1]:
            counts.append(math.ceil(counts[-1] / self.halving))
        last = len(counts) - 1
        return [(n, self.steps // self.halving ** (last - i)) for i, n in enumerate(counts)]

    @property
    def budget(self) -> int:
        """The training steps that the search spends on each row."""
        return len(self.seeds) * sum(count * steps for count, steps in self.rounds)


@dataclass(frozen=True)
class Budget:
    """How many parameters each row may have.

    Attributes:
        percent: in per cent of the base's parameters.
        of: whether parameters count that are trained, or that a saved adapter stores.
    """

    percent: float
    of: Literal["trained", "stored"] = "trained"

    def __str__(self) -> str:
        return f"{self.percent:g} % {self.of}"


def read_budget(where: str, given: Any) -> Budget:
    """The budget that a text such as ``0.5 %`` or ``0.5 % stored`` means.

    Raises:
        RecipeError: the text is something else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?%(?: (trained|stored))?", str(given).strip())
    if found is None or not 0 < float(found[1]) <= 100:
        raise RecipeError(
            f"{where} is {shown(given)}; it must be a share of the base's parameters, such as "
            "0.5 % or 0.5 % stored."
        )
    return Budget(float(found[1]), "stored" if found[2] == "stored" else "trained")


def read_sweep(where: str, given: Any, names: list[str]) -> Sweep:
    """The search that a mapping describes.

    Args:
        where: what messages begin with.
        given: the mapping.
        names: the rows of the grid.

    Raises:
        RecipeError: a key or a row is unknown, or a value is of the wrong kind.
    """
    if not isinstance(given, dict):
        raise RecipeError(f"{where} is {shown(given)}; it must be a mapping of {', '.join(KEYS)}.")
    for key in given:
        if key not in KEYS:
            raise RecipeError(
                f"{where}: unknown key {shown(key)}. {suggest(str(key), KEYS)}"
                f"Keys: {', '.join(KEYS)}."
            )
    rates = _rates(where, given)
    own = given.get("rows", {})
    if not isinstance(own, dict):
        raise RecipeError(f"{where}: rows={shown(own)} must be a mapping of rows to rates.")
    rows = {}
    for row, each in own.items():
        if row not in names:
            raise RecipeError(f"{where}: rows has {shown(row)}. {suggest(str(row), names)}")
        rows[row] = _rates(f"{where} of {row}", each if isinstance(each, dict) else {"rates": each})
        if len(rows[row]) != len(rates):
            raise RecipeError(
                f"{where}: {row} has {len(rows[row])} rates, the other rows {len(rates)}. Every "
                "row gets the same budget: name as many."
            )
    texts = given.get("set", [])
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RecipeError(f"{where}: set={shown(texts)} must be a list of texts, [a=1, b=2].")
    for text in texts:
        if text.partition("=")[0] in FIXED:
            raise RecipeError(f"{where}: set has {shown(text)}, which the sweep sets itself.")
    seeds = given.get("seeds", [1])
    if not isinstance(seeds, list) or not seeds or len(set(map(repr, seeds))) < len(seeds):
        raise RecipeError(f"{where}: seeds={shown(seeds)} must be a list of numbers, each once.")
    for seed in seeds:
        _whole(where, "seeds", seed, 0)
    steps = _whole(where, "steps", given.get("steps"), 1)
    halving = _whole(where, "halving", given.get("halving", 1), 1)
    made = Sweep(rates, steps, tuple(seeds), halving, tuple(texts), rows)
    if made.rounds[0][1] < 1:
        raise RecipeError(
            f"{where}: steps={steps} is too few for {len(made.rounds)} rounds with halving="
            f"{halving}: the first would have none. Take {halving ** (len(made.rounds) - 1)} or "
            "more."
        )
    return made


def _rates(where: str, given: Mapping[str, Any]) -> tuple[float, ...]:
    """The rates that are listed, or those of an even grid of their logarithms."""
    spaced = [key for key in ("low", "high", "points") if key in given]
    if ("rates" in given) == bool(spaced) or (spaced and len(spaced) < 3):
        raise RecipeError(f"{where}: give rates: [1e-4, 1e-3], or all of low, high and points.")
    rates = given.get("rates", [given.get("low"), given.get("high")])
    if not isinstance(rates, list) or len(rates) < 2 or not all(map(_is_rate, rates)):
        raise RecipeError(f"{where}: rates {shown(rates)} must be two or more numbers above 0.")
    if len(set(rates)) < len(rates):
        raise RecipeError(f"{where}: rates {shown(rates)} has a number twice.")
    if not spaced:
        return tuple(sorted(map(float, rates)))
    (low, high), points = rates, _whole(where, "points", given["points"], 2)
    if low > high:
        raise RecipeError(f"{where}: low={low} is above high={high}.")
    ratio = (high / low) ** (1 / (points - 1))
    return tuple(float(f"{low * ratio**i:.3g}") for i in range(points))


def _is_rate(x: Any) -> bool:
    return type(x) in (int, float) and 0 < x < math.inf


def _whole(where: str, key: str, value: Any, least: int) -> int:
    if type(value) is not int or value < least:
        raise RecipeError(f"{where}: {key}={shown(value)} must be a whole number, {least} or more.")
    return value
