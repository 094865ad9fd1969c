"""A sweep chooses rates on validation, with one budget for all rows, and can be resumed."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib import pyplot as plt
from typer.testing import CliRunner

from surgery.cli import app
from surgery.errors import RecipeError
from surgery_recipes.comparison import compare, search, sweep_report
from surgery_recipes.comparison.grid import Grid
from surgery_recipes.comparison.search import Found, choose
from surgery_recipes.comparison.sweep_plan import Sweep, read_sweep
from surgery_recipes.comparison.trials import Score, possible, swept, trial
from tests.recipes import tiny
from tests.recipes.comparison.grids import QUIET, grid, in_process

RATES = (1e-4, 1e-3, 1e-2)


def small(root: Path, output: Path, task: str = "sst2", **more: Any) -> Grid:
    """A grid of one task that runs in a moment, with a sweep."""
    model, data = tiny.prepared(task, root)
    given = [o for o in tiny.overrides(task, model, data, output) if "output=" not in o]
    shape: dict[str, Any] = {
        "rows": ["base", "lora"], "seeds": [1], "baseline": "", "paper": {}, "given": given,
        "sweep": Sweep(RATES, steps=4, halving=2), "tasks": [task], "scores": {task: ["accuracy"]},
    }  # fmt: skip
    return grid(output, **{**shape, **more})


def answered(folder: Path) -> set[str]:
    """The splits that a run answered."""
    lines = (folder / "answers.jsonl").read_text().splitlines()
    return {json.loads(line)["set"] for line in lines}


def trials(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def test_rates_are_chosen_on_validation_and_the_test_is_scored_once(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = small(root, tmp_path)
    ran = in_process(monkeypatch)
    assert compare.run_grid(made, QUIET, sweep=True) == []
    assert len(ran) == len(set(ran)) == 2 * (3 + 2) + 2
    short = [Path(folder) for folder in ran if "/sweep/" in folder]
    assert [answered(folder) for folder in short] == [{"validation"}] * 10
    whole = [Path(folder) for folder in ran if "/sweep/" not in folder]
    assert whole == [tmp_path / "sst2/base/1", tmp_path / "sst2/lora/1"]  # after all trials
    assert ran[-2:] == [str(folder) for folder in whole]
    assert [answered(folder) for folder in whole] == [{"dev"}] * 2
    assert not list((tmp_path / "sweep").rglob("*.safetensors"))  # no weights are left

    rows = trials(tmp_path)
    for row in ("base", "lora"):
        own = [r for r in rows if r["row"] == row]
        assert [r["steps"] for r in own] == ["2"] * 3 + ["4"] * 2, "every row has one budget"
        last = {float(r["rate"]): float(r["score"]) for r in own if r["steps"] == "4"}
        best = max(last, key=lambda rate: (last[rate], -rate))
        assert {float(r["rate"]) for r in own if r["chosen"] == "1"} == {best}
        recipe = (tmp_path / f"sst2/{row}/1/recipe.yaml").read_text()
        assert f"learning_rate: {best!r}" in recipe
    text = (tmp_path / "table.md").read_text()
    assert "| learning rate |" in text
    assert "14 steps in all, the best 1/2 of each round going on" in text
    assert "sst2/base: the untouched base; the new head alone is trained." in text
    assert "sweep.png" in (tmp_path / "table.html").read_text()
    assert (tmp_path / "sweep.png").is_file()
    with (tmp_path / "table.csv").open() as file:
        assert all(float(line["learning_rate"]) in RATES for line in csv.DictReader(file))

    # killed in the middle: one trial and one run are missing, and are all that runs
    ran.clear()
    shutil.rmtree(short[3])
    shutil.rmtree(whole[1])
    before = (tmp_path / "sweep.csv").read_text()
    assert compare.run_grid(made, QUIET, sweep=True) == []
    assert ran == [str(short[3]), str(whole[1])]
    assert (tmp_path / "sweep.csv").read_text() == before


def test_the_journal_of_optuna_has_every_trial_once(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a process was killed that had asked for all points and run one."""
    import optuna

    made = small(root, tmp_path, rows=["lora"], sweep=Sweep(RATES, steps=2))
    ran = in_process(monkeypatch)
    whole = search.Workers.run

    def killed(self: Any, todo: Any) -> Any:
        whole(self, todo[:1])
        raise KeyboardInterrupt

    monkeypatch.setattr(search.Workers, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        search.search(made, QUIET, trust=False)
    monkeypatch.setattr(search.Workers, "run", whole)
    search.search(made, QUIET, trust=False)
    assert len(ran) == len(set(ran)) == 3
    storage = search.open_journal(tmp_path / "sweep")
    study = optuna.load_study(study_name="sst2/lora, 2 steps", storage=storage)
    done = [t for t in study.trials if t.value is not None]
    assert sorted(t.params["rate"] for t in done) == list(RATES)
    rows = {float(r["rate"]): r for r in _written(made, tmp_path)}
    assert all(t.user_attrs["score"] == float(rows[t.params["rate"]]["score"]) for t in done)


def _written(made: Grid, folder: Path) -> list[dict[str, str]]:
    sweep_report.write(made, search.search(made, QUIET, trust=False))
    return trials(folder)


def test_a_trial_that_fails_is_the_worst_and_is_named(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = small(root, tmp_path, rows=["lora"], sweep=Sweep((1e-4, 1e-3, 1e30), steps=2))
    broken = trial(made, "sst2", "lora", 1e-4, 1, 2).folder
    ran = in_process(monkeypatch)
    broken.parent.mkdir(parents=True)
    broken.mkdir()
    (broken / "checkpoints").write_text("a file where the run needs a folder")
    found = search.search(made, QUIET, trust=False)[("sst2", "lora")]
    assert len(ran) == 3
    assert found.rate == 1e-3
    why = {one.rate: score.why for one, score in found.rounds[0]}
    assert "log.txt" in why[1e-4]
    assert "not a finite number" in why[1e30]
    assert why[1e-3] == ""


def test_a_row_whose_trials_all_fail_is_not_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = small(root, tmp_path, sweep=Sweep((1e29, 1e30), steps=2), rows=["lora"])
    ran = in_process(monkeypatch)
    [lost] = compare.run_grid(made, QUIET, sweep=True)
    assert (lost.row, len(ran)) == ("lora", 2)
    assert not (tmp_path / "sst2").exists()


def test_a_best_rate_at_the_edge_is_flagged(tmp_path: Path) -> None:
    made = grid(tmp_path, rows=["lora", "prefix"], sweep=Sweep(RATES, steps=2), baseline="")

    def found(row: str, scores: tuple[float, ...]) -> Found:
        pairs = zip(RATES, scores, strict=True)
        return Found([[(trial(made, "sst2", row, r, 1, 2), Score("a", s)) for r, s in pairs]],
                     rate=RATES[scores.index(max(scores))])  # fmt: skip

    pairs = {
        ("sst2", "lora"): found("lora", (1, 2, 3)),
        ("sst2", "prefix"): found("prefix", (1, 3, 2)),
    }
    chosen = choose(made, pairs).chosen
    assert (chosen["sst2/lora"].rate, chosen["sst2/lora"].edge) == (1e-2, True)
    assert (chosen["sst2/prefix"].rate, chosen["sst2/prefix"].edge) == (1e-3, False)


def test_curves_have_labels_that_do_not_overlap(tmp_path: Path) -> None:
    rows = ["lora", "prefix", "inducer", "adapter", "bitfit", "mam_adapter", "fine_tuning"]
    made = grid(tmp_path, tasks=["sst2", "mnli"], rows=rows, sweep=Sweep(RATES, steps=2),
                scores={"sst2": ["accuracy"], "mnli": ["accuracy_matched"]})  # fmt: skip
    found = {
        (task, row): Found(
            [[(trial(made, task, row, r, 1, 2), Score("accuracy", 0.5)) for r in RATES]], rate=1e-3
        )
        for task in made.tasks
        for row in rows
    }
    figure = sweep_report.draw(made, found)
    figure.canvas.draw()
    boxes = []
    for place in figure.axes:
        assert place.get_xscale() == "log"
        texts = place.get_legend().get_texts()
        assert [text.get_text() for text in texts] == [f"{row}: 0.001" for row in rows]
        boxes += [text.get_window_extent() for text in texts]
        boxes.append(place.get_window_extent())
    overlapping = [
        (one, other) for i, one in enumerate(boxes) for other in boxes[:i] if one.overlaps(other)
    ]
    assert overlapping == []
    plt.close(figure)


def test_all_rows_have_as_many_trials_and_steps(root: Path, tmp_path: Path) -> None:
    sweep = Sweep((1e-5, 1e-4, 1e-3, 1e-2, 1e-1), 9, seeds=(1, 2), halving=3)
    made = small(root, tmp_path, rows=["base", "fine_tuning", "lora", "bitfit"], sweep=sweep)
    assert sweep.rounds == [(5, 3), (2, 9)]
    assert sweep.budget == 2 * (5 * 3 + 2 * 9)
    counts = {row: sum(t.row == row for t in possible(made)) for row in made.rows}
    assert set(counts.values()) == {2 * 5 * 2}


def test_a_base_of_which_nothing_is_trained_has_no_rate(root: Path, tmp_path: Path) -> None:
    made = small(root, tmp_path, "webnlg", scores={"webnlg": ["bleu"]})
    assert swept(made) == [("webnlg", "lora")]


def test_the_command_line_sweeps(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row whose rates are its own, named in the file of the table."""
    own = small(root, tmp_path).given
    table = {
        "title": "A table", "tasks": ["sst2"], "rows": ["lora"], "scores": {"sst2": ["accuracy"]},
        "sweep": {"rates": [1, 2], "steps": 1, "rows": {"lora": [1e-3, 1e-2]}},
        "output": str(tmp_path / "out"),
    }  # fmt: skip
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(table))
    ran = in_process(monkeypatch)
    words = ["compare", str(tmp_path / "grid.yaml"), *own, "--sweep", "--no-diagnose"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "1 recipes, 2 trials, 2 steps for each recipe" in " ".join(done.output.split())
    assert [Path(folder).parts[-3:] for folder in ran] == [
        ("lora", "0.001", "1"), ("lora", "0.01", "1"), ("sst2", "lora", "1"),
    ]  # fmt: skip
    rates = {float(row["rate"]) for row in trials(tmp_path / "out")}
    assert rates == {1e-3, 1e-2}
    assert "is at the edge of its range, 0.001 to 0.01" in (tmp_path / "out/table.md").read_text()


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"sweep": None}, "--sweep: the grid does not say what to try"),
        ({"given": ["training.learning_rate=1"]}, "--sweep chooses this"),
        ({"sweep": Sweep(RATES, 2, set=("lmit.train=2",))}, "unknown key 'lmit'"),
        ({"scores": {"sst2": ["acuracy"]}}, "has no score 'acuracy'"),
    ],
)
def test_what_would_fail_is_found_before_any_trial(
    more: dict[str, Any], part: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = small(root, tmp_path / "grid", **{"rows": ["lora"], **more})
    ran = in_process(monkeypatch)
    with pytest.raises(RecipeError, match=part):
        compare.run_grid(made, QUIET, sweep=True)
    assert ran == []
    assert not (tmp_path / "grid").exists()


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ([1], "must be a mapping"),
        ({"rate": [1]}, "unknown key 'rate'. Did you mean 'rates'"),
        ({"rates": [1e-3], "steps": 1}, "two or more"),
        ({"rates": [1e-3, 1e-3], "steps": 1}, "twice"),
        ({"rates": [1e-3, "x"], "steps": 1}, "two or more numbers"),
        ({"low": 1e-3, "high": 1, "steps": 1}, "all of low, high and points"),
        ({"low": 1, "high": 1e-3, "points": 3, "steps": 1}, "is above"),
        ({"rates": [1, 2]}, "steps=None"),
        ({"rates": [1, 2, 3, 4], "steps": 1, "halving": 2}, "too few for 2 rounds"),
        ({"rates": [1, 2], "steps": 1, "seeds": [1, 1]}, "each once"),
        ({"rates": [1, 2], "steps": 1, "set": ["output=x"]}, "which the sweep sets itself"),
        ({"rates": [1, 2], "steps": 1, "rows": {"lora": [1, 2, 3]}}, "3 rates, the other rows 2"),
        ({"rates": [1, 2], "steps": 1, "rows": {"lroa": [1, 2]}}, "Did you mean 'lora'"),
    ],
)
def test_a_sweep_that_is_not_possible_says_why(given: Any, part: str) -> None:
    with pytest.raises(RecipeError, match=part):
        read_sweep("grid: sweep", given, ["lora"])


def test_a_grid_of_rates_is_even_in_the_logarithm() -> None:
    spaced = {"low": 1e-5, "high": 1e-1, "points": 5, "steps": 10}
    made = read_sweep("", {**spaced, "rows": {"lora": [1, 2, 3, 4, 5]}}, ["lora"])
    assert made.rates == (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    assert made.rates_of("lora") == (1, 2, 3, 4, 5)


def test_a_long_warm_up_is_shortened_in_a_trial(root: Path, tmp_path: Path) -> None:
    given = ["training.warmup_steps=500"]
    made = small(root, tmp_path, rows=["lora"], given=given, sweep=Sweep(RATES, steps=100))
    assert "training.warmup_steps=0.1" in possible(made)[0].set
    made = small(root, tmp_path, rows=["lora"], given=given, sweep=Sweep(RATES, steps=9000))
    assert not any("warmup" in text for text in possible(made)[0].set)
