"""Solve the sizes of rows for a budget of parameters: ranks, lengths, bottlenecks.

A method names the options that set its size (``Method.size``). A row may have several, such as the
ranks of a preset. They grow one step at a time, in the proportions that its recipe has: the next
step goes to the option with the greatest ``recipe's value / (2 value + 1)`` (the divisor method of
Sainte-Laguë). So each step adds parameters, and the largest number of steps within the budget is
found by a search over whole numbers. Then each option is raised alone while that stays within the
budget. At the end no option can be raised; with one option, the count is the nearest not above.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from surgery import RecipeError, SurgeryError
from surgery_recipes.comparison.grid import Choice, Grid, cells, recipe_of
from surgery_recipes.recipe_files import Recipe, write_whole
from surgery_recipes.run import Counter, planned_methods

Option = tuple[int, str]  # the number of a splice entry, and the name of its option
FILE = "budget.json"


def within_budget(grid: Grid, console: Console, trust: bool = False) -> Grid:
    """The grid with the sizes that its budget allows.

    Args:
        grid: a grid with a budget. A row whose methods name no size keeps its own.
        console: where to show how far it is.
        trust: whether the package of ``model: package:NAME`` may be imported, whatever it is.

    Raises:
        RecipeError: the smallest size of a row is above the budget.
    """
    chosen = dict(grid.chosen)
    first = {(cell.task, cell.row): cell for cell in reversed(cells(grid))}
    counts = Counts(Path(grid.output) / FILE, trust)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        for pair in progress.track(sorted(first), description="sizes for the budget"):
            recipe = recipe_of(grid, first[pair])
            made = solve(grid, recipe, counts, f"{pair[0]}/{pair[1]}")
            if made is not None:
                name = "/".join(pair)
                chosen[name] = dataclasses.replace(
                    chosen.get(name, Choice()),
                    size=", ".join(f"{option}={value}" for (_, option), value in made.items()),
                    set=(f"splice={json.dumps(sized(recipe, made).splice)}",),
                )
    counts.keep()
    return dataclasses.replace(grid, chosen=chosen)


def solve(grid: Grid, recipe: Recipe, counts: Counts, name: str) -> dict[Option, int] | None:
    """The sizes of a recipe that come nearest to the budget, not above it; None if it has none.

    Raises:
        RecipeError: even the smallest sizes are above the budget, or sizes do not change the count.
    """
    assert grid.budget is not None
    own = options(recipe)
    if not own:
        return None
    limit = grid.budget.percent / 100 * counts.base(recipe)
    of = grid.budget.of

    def count(steps: int) -> int | None:
        try:
            return counts.of(sized(recipe, apportion(own, steps)), of)
        except SurgeryError:
            if steps == len(own):
                raise
            return None  # a method refuses a size as great as this

    least = count(len(own))
    assert least is not None
    smallest = ", ".join(f"{option}=1" for _, option in own)
    if least > limit:
        raise RecipeError(
            f"budget: {grid.budget} of the base's parameters are {limit:,.0f}, but {name} with "
            f"{smallest} has {least:,} ({of}). Raise the budget, count what is stored (0.5 % "
            "stored), or leave the row out."
        )
    if count(len(own) + 1) == least:
        raise RecipeError(
            f"budget: {name} has {least:,} parameters ({of}) whatever {smallest} is raised to. Its "
            "size is set elsewhere: leave the row out."
        )
    sizes = apportion(own, largest_within(count, len(own), least, limit))
    if len(own) == 1:
        return sizes
    return filled(sizes, lambda each: counts.of(sized(recipe, each), of), limit)


def largest_within(count: Callable[[int], int | None], low: int, at_low: int, limit: float) -> int:
    """The largest n with ``count(n) <= limit``, for a count that grows with n from ``low`` on.

    Counts of most methods are lines in n, so the next n to try is where a line through the last
    two counts meets the limit; every second try halves the interval, which ends for any count.

    Args:
        count: the count of n; None where n is too great.
        low: a number whose count is within the limit.
        at_low: the count of ``low``.
        limit: what the count may not exceed.
    """
    first, at_first = low, at_low
    high: int | None = None
    tries = 0
    while high is None or high - low > 1:
        slope = (at_low - at_first) / (low - first) if low > first else 0.0
        step = int((limit - at_low) / slope) if slope > 0 else 1
        n = low + max(1, step)
        if high is not None:
            n = (low + high) // 2 if tries % 2 and n != low + 1 else min(n, high - 1)
        tries += 1
        found = count(n)
        if found is not None and found <= limit:
            low, at_low = n, found
        else:
            high = n
    return low


def filled(
    sizes: dict[Option, int], count: Callable[[dict[Option, int]], int], limit: float
) -> dict[Option, int]:
    """Raise options one by one for as long as the count stays within the limit."""
    growing = list(sizes)
    while growing:
        more = {**sizes, growing[0]: sizes[growing[0]] + 1}
        try:
            fits = count(more) <= limit
        except SurgeryError:
            fits = False
        if fits:
            sizes = more
        growing = [*growing[1:], growing[0]] if fits else growing[1:]
    return sizes


def options(recipe: Recipe) -> dict[Option, int]:
    """The options that set the size of a recipe, with the values that it has.

    Raises:
        RecipeError: a method names an option that is no whole number.
    """
    found = {}
    for index, (method, _) in enumerate(planned_methods(recipe)):
        for option in method.size:
            value = method.options().get(option)
            if type(value) is not int:
                raise RecipeError(
                    f"budget: method {method.name!r} names {option!r} as its size, which is not an "
                    f"option that is a whole number. Options: {', '.join(method.options())}."
                )
            if value > 0:
                found[index, option] = value
    return found


def apportion(weights: dict[Option, int], steps: int) -> dict[Option, int]:
    """Share steps among options in proportion to their weights; each gets one or more."""
    given = dict.fromkeys(weights, 1)
    queue = [(-weight / 3, place, key) for place, (key, weight) in enumerate(weights.items())]
    if len(weights) == 1:
        return dict.fromkeys(weights, steps)
    heapq.heapify(queue)
    for _ in range(steps - len(weights)):
        _, place, key = heapq.heappop(queue)
        given[key] += 1
        heapq.heappush(queue, (-weights[key] / (2 * given[key] + 1), place, key))
    return given


def sized(recipe: Recipe, sizes: dict[Option, int]) -> Recipe:
    """The recipe with other values of some options."""
    splice = [dict(entry) for entry in recipe.splice]
    for (index, option), value in sizes.items():
        splice[index][option] = value
    return dataclasses.replace(recipe, splice=splice)


class Counts:
    """Counts parameters, and keeps what it counted in a file, for when the grid is run again."""

    def __init__(self, file: Path, trust: bool) -> None:
        self.file, self.trust = file, trust
        self.counters: dict[str, Counter] = {}
        self.known: dict[str, list[int]] = {}
        with contextlib.suppress(OSError, ValueError):  # then all is counted anew
            self.known = json.loads(file.read_bytes())

    def base(self, recipe: Recipe) -> int:
        """The parameters of the base of a recipe."""
        return self._all(dataclasses.replace(recipe, splice=[]))[0]

    def of(self, recipe: Recipe, what: str) -> int:
        """The parameters that a recipe inserts: ``trained`` or ``stored``."""
        return self._all(recipe)[1 if what == "trained" else 2]

    def _all(self, recipe: Recipe) -> list[int]:
        same = json.dumps([recipe.model, recipe.task, recipe.data], sort_keys=True, default=str)
        key = f"{same} {json.dumps(recipe.splice, sort_keys=True, default=str)}"
        if key not in self.known:
            if same not in self.counters:
                self.counters[same] = Counter(recipe, self.trust)
            self.known[key] = list(dataclasses.astuple(self.counters[same].count(recipe)))
        return self.known[key]

    def keep(self) -> None:
        """Write the file."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.file, json.dumps(self.known, indent=1))
