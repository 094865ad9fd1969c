"""Choose the learning rate of each row of a grid on validation, with the same budget for all rows.

    possible(grid)      every trial that may come, checked before the first
    rounds              all rates, then the better ones with more steps (successive halving)
    Study               Optuna gives out the points and keeps the scores
    Workers             a process for each trial, OUTPUT/sweep/TASK/ROW/RATE/SEED
    choose              the rate with the best mean over seeds -> Grid.chosen

A finished trial is not repeated. A trial that fails or diverges is the worst, and is named.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.text import Text

from surgery import RecipeError
from surgery_recipes.comparison.finished_runs import LOWER_IS_BETTER
from surgery_recipes.comparison.grid import Cell, Choice, Grid, cells, check
from surgery_recipes.comparison.study import Study, open_journal, require_optuna
from surgery_recipes.comparison.trials import (
    Score,
    Trial,
    plan_of,
    possible,
    read_score,
    swept,
    trial,
)
from surgery_recipes.comparison.workers import Workers
from surgery_recipes.recipe_files import read_recipe

Pair = tuple[str, str]
RATE = "training.learning_rate"


@dataclass
class Found:
    """What a sweep found for one recipe.

    Attributes:
        rounds: for each round its trials, with their scores.
        rate: the best rate of the last round; None if every trial failed.
    """

    rounds: list[list[tuple[Trial, Score]]] = field(default_factory=list)
    rate: float | None = None

    def means(self, number: int) -> dict[float, float]:
        """The mean score of each rate of a round whose trials all have one, by rate."""
        by_rate: dict[float, list[Score]] = {}
        for one, score in self.rounds[number]:
            by_rate.setdefault(one.rate, []).append(score)
        return {
            rate: statistics.mean(score.value for score in scores)
            for rate, scores in sorted(by_rate.items())
            if all(score.good for score in scores)
        }

    def ranked(self, number: int) -> list[float]:
        """The rates of a round that have a score, from the best to the worst."""
        means = self.means(number)
        return sorted(means, key=lambda rate: -better(self.score_name) * means[rate])

    @property
    def score_name(self) -> str:
        """The score that was compared; "" if every trial failed."""
        return next((s.name for each in self.rounds for _, s in each if s.name), "")


def better(score: str) -> int:
    """1 if a higher value of this score is better, -1 if a lower one is."""
    return -1 if score.startswith(LOWER_IS_BETTER) else 1


def check_sweep(grid: Grid, trust: bool) -> None:
    """Check every trial that may come, and the runs that will follow, before anything starts.

    Raises:
        RecipeError: a setting is wrong, there is no validation split, or a folder holds a run with
            other settings, such as a rate that the sweep does not try.
    """
    require_optuna()
    sweep = plan_of(grid)
    for text in grid.given:
        if text.startswith(f"{RATE}="):
            raise RecipeError(f"{text}: --sweep chooses this. Leave one of them out.")
    trials = possible(grid)
    check(grid, list(trials), trust)
    chosen = dict(grid.chosen)
    for cell in cells(grid):
        pair = f"{cell.task}/{cell.row}"
        file = cell.folder / "recipe.yaml"
        if (cell.task, cell.row) in swept(grid) and (cell.finished or cell.begun):
            had = read_recipe(file).training.get("learning_rate") if file.is_file() else None
            if had in sweep.rates_of(cell.row):
                before = grid.chosen.get(pair, Choice())
                chosen[pair] = dataclasses.replace(before, set=(*before.set, f"{RATE}={had!r}"))
    check(dataclasses.replace(grid, chosen=chosen), cells(grid), trust)


def search(grid: Grid, console: Console, trust: bool) -> dict[Pair, Found]:
    """Run what is missing of the sweep; return what it found for each recipe."""
    sweep, pairs = plan_of(grid), swept(grid)
    storage = open_journal(Path(grid.output) / "sweep")
    found = {pair: Found() for pair in pairs}
    rates = {(task, row): list(sweep.rates_of(row)) for task, row in pairs}
    each = len(sweep.seeds) * len(pairs)
    total = each * sum(count * steps for count, steps in sweep.rounds)
    said = f"{len(pairs)} recipes, {each * sum(n for n, _ in sweep.rounds)} trials, "
    said += f"{sweep.budget:,} steps for each recipe"
    console.print(Text(f"{grid.title}, sweep: {said}"))
    with Workers(grid, console, trust, "sweep", total) as workers:
        for number, (_, steps) in enumerate(sweep.rounds):
            todo: list[Trial] = []
            studies: dict[Pair, Study] = {}
            for pair in pairs:
                name = f"{pair[0]}/{pair[1]}, {steps} steps"
                trials = [
                    trial(grid, *pair, rate, seed, steps)
                    for rate in rates[pair]
                    for seed in sweep.seeds
                ]
                studies[pair] = Study(storage, name, rates[pair], sweep.seeds)
                studies[pair].ask()
                found[pair].rounds.append([(t, Score("", 0.0)) for t in trials])
                todo += [t for t in trials if not t.finished]
                workers.skip([t for t in trials if t.finished])
            workers.run(todo)
            for pair, made in found.items():
                scored = [(t, read_score(grid, t)) for t, _ in made.rounds[number]]
                made.rounds[number] = scored
                for t, score in scored:
                    value = score.value if score.good else None
                    forget_weights(t)
                    studies[pair].tell((t.rate, t.seed), value, better(score.name))
                    if not score.good:
                        console.print(Text(f"bad trial: {t}: {score.why}", style="bold red"))
                keep = sweep.rounds[number + 1][0] if number + 1 < len(sweep.rounds) else 1
                rates[pair] = sorted(made.ranked(number)[:keep])
    for made in found.values():
        made.rate = next(iter(made.ranked(-1)), None) if made.rounds[-1] else None
    return found


def forget_weights(one: Trial) -> None:
    """Remove what a finished trial learnt: its score is all that is needed of it."""
    if one.finished:
        for name in ("adapter", "model"):
            shutil.rmtree(one.folder / name, ignore_errors=True)


def choose(grid: Grid, found: dict[Pair, Found]) -> Grid:
    """The grid with the rates that the sweep found."""
    sweep, chosen = plan_of(grid), dict(grid.chosen)
    for (task, row), made in found.items():
        if made.rate is None:
            continue
        tried = sweep.rates_of(row)
        before = chosen.get(f"{task}/{row}", Choice())
        chosen[f"{task}/{row}"] = dataclasses.replace(
            before,
            rate=made.rate,
            edge=made.rate in (tried[0], tried[-1]),
            set=(*before.set, f"{RATE}={made.rate!r}"),
        )
    return dataclasses.replace(grid, chosen=chosen)


def without_rate(found: dict[Pair, Found], everything: list[Cell]) -> list[Cell]:
    """The cells that cannot be run, because every trial of their recipe failed."""
    lost = {pair for pair, made in found.items() if made.rate is None}
    return [cell for cell in everything if (cell.task, cell.row) in lost]
