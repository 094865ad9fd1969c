"""A grid runs what is missing, on the GPUs there are, after everything was checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from surgery.errors import RecipeError
from surgery_recipes.comparison import compare, workers
from surgery_recipes.comparison.grid import cells, recipe_of
from surgery_recipes.recipe_files import write_recipe
from tests.recipes import tiny
from tests.recipes.comparison.grids import QUIET, begun, finished, grid


def test_a_folder_of_other_settings_is_no_result(root: Path, tmp_path: Path) -> None:
    _, data = tiny.prepared("sst2", root)
    before = grid(tmp_path, seeds=[1], given=[f"data={data}", "training.max_steps=150"])
    finished(cells(before)[0], 0.5, before)
    now = grid(tmp_path, seeds=[1], given=[f"data={data}", "training.max_steps=200"])
    with pytest.raises(RecipeError, match=r"training.max_steps=150, this grid asks for 200"):
        compare.run_grid(now, QUIET)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (["training.lerning_rate=1"], "no 'lerning_rate'. Did you mean 'learning_rate'"),
        (["data=nowhere"], "data path nowhere: no such folder"),
        (["data.max_lenght=3"], "max_lenght"),
        (["training.learning_rate=abc"], "learning_rate='abc' must be a number"),
        (["training.per_device_train_batch_size=0"], "must be a whole number, 1 or more"),
        (["model=./nothing"], "'./nothing': no such folder"),
        (["limit={tst: 3}"], "no split 'tst'"),
        (["data.max_length=2"], "max_length=2 leaves almost nothing"),
    ],
)
def test_what_would_fail_in_every_run_is_found_before_any(
    given: list[str], part: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = tiny.prepared("sst2", root)
    monkeypatch.setattr(workers.subprocess, "run", lambda *a, **o: pytest.fail("it ran"))
    own = [f"model={model}", f"data={data}", "data.held_out=2"]
    with pytest.raises(RecipeError, match=part):
        compare.run_grid(grid(tmp_path / "grid", given=[*own, *given]), QUIET)
    assert not (tmp_path / "grid").exists()


def test_a_score_that_the_task_does_not_give_is_found_before_any_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = tiny.prepared("sst2", root)
    monkeypatch.setattr(workers.subprocess, "run", lambda *a, **o: pytest.fail("it ran"))
    own = [f"model={model}", f"data={data}", "data.held_out=2"]
    made = grid(tmp_path / "grid", given=own, scores={"sst2": ["acuracy"]}, paper={})
    with pytest.raises(RecipeError, match="has no score 'acuracy'"):
        compare.run_grid(made, QUIET)


def test_runs_share_the_gpus_that_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv(workers.GPUS, raising=False)
    assert workers.gpus() == ["0", "1"]
    monkeypatch.setenv(workers.GPUS, "2, GPU-77")
    assert workers.gpus() == ["2", "GPU-77"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert workers.gpus() == []  # named, but not there


def test_only_what_is_missing_is_run_and_the_unfinished_goes_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = tiny.prepared("sst2", root)
    row_set = {"lora": ["patience=0"]}
    made = grid(
        tmp_path,
        seeds=[1],
        set=["about=x"],
        row_set=row_set,
        given=[f"model={model}", f"data={data}", "data.held_out=2"],
    )
    first, second, third = cells(made)
    finished(first, 0.5, made)
    begun(second)
    write_recipe(recipe_of(made, second), second.folder / "recipe.yaml")
    asked: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        asked.append(command[3:])
        cell = next(c for c in (second, third) if f"output={c.folder}" in command)
        if cell is third:
            return type("Done", (), {"returncode": 1})
        (cell.folder / "metrics.json").write_text((first.folder / "metrics.json").read_text())
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(workers.subprocess, "run", run)
    assert compare.run_grid(made, QUIET) == [third]
    head = [
        "train",
        "sst2/inducer",
        "about=x",
        f"model={model}",
        f"data={data}",
        "data.held_out=2",
        "training.seed=1",
    ]
    assert asked[0] == [*head, f"output={second.folder}", "--resume"]
    assert asked[1][:3] == ["train", "sst2/lora", "about=x"]
    assert "patience=0" in asked[1]
    assert asked[1][-1] == "--overwrite"  # of what an interrupted run without checkpoints left
    assert "prefix" in (tmp_path / "table.md").read_text()


@pytest.mark.slow
def test_a_worker_imports_nothing_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that pass for libraries lie in the folder where ``compare`` is called."""
    monkeypatch.chdir(tmp_path)
    for name in ("surgery", "typer", "rich", "torch", "yaml", "surgery_recipes", "surgery_plugins"):
        (tmp_path / f"{name}.py").write_text("open('imported', 'w')")
    made = grid(tmp_path / "grid", rows=["lora"], seeds=[1], baseline="", set=["titel=[/x]"])
    [cell] = cells(made)
    assert not workers.run_cell(made, cell, "", trust=True)
    log = (cell.folder / "log.txt").read_text()
    assert "unknown key 'titel'" in log
    assert not (tmp_path / "imported").exists()


@pytest.mark.slow
def test_a_grid_runs_and_is_shown(root: Path, tmp_path: Path) -> None:
    model, data = tiny.prepared("sst2", root)
    settings = [o for o in tiny.overrides("sst2", model, data, tmp_path) if "output=" not in o]
    output = tmp_path / "grid"
    made = grid(output, rows=["prefix", "lora"], seeds=[1], paper={}, given=settings)
    assert compare.run_grid(made, QUIET, diagnosed=True) == []
    log = (tmp_path / "grid/sst2/lora/1/log.txt").read_text()
    assert "surgery eval" in log
    assert len((tmp_path / "grid/table.md").read_text().splitlines()) > 5
    page = (tmp_path / "grid/table.html").read_text()
    assert page.count('<img src="data:image/png;base64,') == 5  # LoRA has no virtual keys
    assert "<h2>Why</h2>" in page
    again = tmp_path / "grid/sst2/lora/1/diagnosis/losses.csv"
    written = again.stat().st_mtime_ns
    assert compare.run_grid(made, QUIET, diagnosed=True) == []
    assert again.stat().st_mtime_ns == written, "what is diagnosed is not diagnosed again"
