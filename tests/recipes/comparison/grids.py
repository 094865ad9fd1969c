"""What the tests of comparisons share: a small grid, and runs that look finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner

from surgery.cli import app
from surgery_recipes.comparison import workers
from surgery_recipes.comparison.grid import Cell, Grid, recipe_of
from surgery_recipes.recipe_files import write_recipe

QUIET = Console(quiet=True)


def finished(
    cell: Cell,
    score: float,
    made: Grid | None = None,
    resampled: list[float] | None = None,
    **more: Any,
) -> None:
    """Leave what a run of this cell would."""
    row = {
        "scores": {"accuracy": score}, "percent": 0.5, "stored": 0.25,
        "trainable": 1000 + len(cell.row), "seconds": 60.0, **more,
        "by_length": [[5, score], [9, score], [14, score], [30, score]],
    }  # fmt: skip
    cell.folder.mkdir(parents=True)
    about = {"machine": "a machine", "versions": {"torch": "2"}, "notes": {"ter": "no TER today"}}
    (cell.folder / "metrics.json").write_text(json.dumps({"rows": [row], **about}))
    if resampled is not None:
        of = {"examples": 100, "values": resampled}
        (cell.folder / "resampled.json").write_text(json.dumps({"accuracy": of}))
    if made is not None:
        write_recipe(recipe_of(made, cell), cell.folder / "recipe.yaml")


def begun(cell: Cell) -> None:
    """Leave a checkpoint with the files that a run is resumed from."""
    folder = cell.folder / "checkpoints/checkpoint-3"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({}, folder / name)
    save_file({"x": torch.ones(1)}, folder / "model.safetensors")


def grid(output: Path, **more: Any) -> Grid:
    shape: dict[str, Any] = {
        "title": "A table", "tasks": ["sst2"], "rows": ["prefix", "inducer", "lora"],
        "scores": {"sst2": ["accuracy"]}, "seeds": [1, 2, 3], "baseline": "prefix",
        "paper": {"inducer": {"sst2.accuracy": 94.2}}, "output": str(output),
    }  # fmt: skip
    return Grid(**{**shape, **more})


def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let runs happen in this process, which is faster; return the names of their folders."""
    ran: list[str] = []

    def run(command: list[str], stdout: Any, **_: Any) -> Any:
        done = CliRunner().invoke(app, command[3:])
        stdout.write(done.output)
        ran.append(next(w for w in command if w.startswith("output=")).removeprefix("output="))
        return type("Done", (), {"returncode": done.exit_code})

    monkeypatch.setattr(workers.subprocess, "run", run)
    return ran
