"""A grid says how long it takes, and can be made to fit a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.errors import RecipeError
from surgery_recipes.comparison import duration
from surgery_recipes.comparison.grid import cells, recipe_of
from surgery_recipes.run import Cost, cost
from tests.recipes import tiny
from tests.recipes.comparison.grids import grid


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30min", 1800), ("1.5h", 5400), ("2 d", 172800)]
)
def test_a_time_has_a_number_and_a_unit(text: str, seconds: float) -> None:
    assert duration.seconds_of(text) == seconds
    with pytest.raises(RecipeError, match="a number and a unit"):
        duration.seconds_of(text + "x")
    assert duration.seconds_of(duration.shown(seconds)) == pytest.approx(seconds, rel=0.05)


@pytest.mark.parametrize("task", ["sst2", "webnlg", "digits"])
def test_steps_and_answers_of_a_run_are_timed(task: str, root: Path, tmp_path: Path) -> None:
    model, data = tiny.prepared(task, root)
    own = [o for o in tiny.overrides(task, model, data, tmp_path) if "output=" not in o]
    rows = ["lora"]
    made = grid(tmp_path, tasks=[task], rows=rows, scores={task: ["x"]}, paper={}, given=own)
    found = cost(recipe_of(made, cells(made)[0]))
    assert (found.steps, found.step > 0, found.scoring > 0) == (4, True, True)
    assert found.seconds == 4 * found.step + found.scoring
    epochs = [*(o for o in own if "max_steps" not in o), "training.num_train_epochs=3"]
    made = grid(tmp_path, tasks=[task], rows=rows, scores={task: ["x"]}, paper={}, given=epochs)
    assert cost(recipe_of(made, cells(made)[0])).steps % 3 == 0


def test_runs_are_shortened_in_one_proportion_to_fit_a_time(tmp_path: Path) -> None:
    made = grid(tmp_path)
    todo = cells(made)  # nine runs
    found = {"sst2": Cost(steps=100, step=1.0, scoring=10.0)}
    assert duration.total(found, todo, 1) == 990
    assert duration.total(found, todo, 3) == 330
    assert duration.fitted(made, found, todo, 1, 1000) is made
    shorter = duration.fitted(made, found, todo, 1, 540)
    assert shorter.task_set == {"sst2": ["training.max_steps=50"]}
    # the same command goes on with the same steps, whatever it measures now
    slower = {"sst2": Cost(steps=100, step=2.0, scoring=10.0)}
    assert duration.fitted(made, slower, todo[3:], 1, 540) == shorter
    with pytest.raises(RecipeError, match=r"takes about 1\.5 min alone"):
        duration.fitted(made, found, todo, 1, 60)
