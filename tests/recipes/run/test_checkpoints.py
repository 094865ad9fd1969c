"""A run that is killed goes on from its newest whole checkpoint, and ends as an unbroken one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from surgery.cli import app
from surgery.errors import RecipeError
from surgery_recipes.recipe_files import Recipe
from surgery_recipes.run import finetune
from surgery_recipes.run.checkpoints import checkpoints, drop_newer, is_whole, whole_checkpoints
from tests.recipes import tiny
from tests.recipes.run.runs import QUIET, recipe, tensors

EACH_STEP = ["training.save_steps=1", "training.eval_steps=1", "patience=0"]
EACH_STEP += ["training.load_best_model_at_end=false", "training.save_total_limit=99"]
RESUME = finetune.RunOptions(resume=True)


def killed_at(step: int, run: Path, copy: Path) -> Path:
    """What is left of a run that was killed after a step, before the next checkpoint."""
    shutil.copytree(run, copy)
    last = copy / f"checkpoints/checkpoint-{step}"
    drop_newer(copy, last)
    assert is_whole(last)
    for name in ("metrics.json", "trained.json"):
        (copy / name).unlink()
    shutil.rmtree(copy / "adapter", ignore_errors=True)
    return copy


def same(one: Path, two: Path) -> bool:
    a, b = tensors(one), tensors(two)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def zeroed(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


NAMES = ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "surgery.json"]
HARMS: list[Callable[[Path], None]] = [Path.unlink, cut, emptied, zeroed]


@pytest.fixture(scope="module")
def finished(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of four steps, with a checkpoint after each."""
    run = tmp_path_factory.mktemp("finished") / "run"
    finetune.train(made(root, run), QUIET)
    return run


def made(root: Path, run: Path) -> Recipe:
    return recipe("sst2/lora", root, run, *EACH_STEP)


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_a_checkpoint_with_a_harmed_file_is_not_whole(
    harm: Callable[[Path], None], finished: Path, tmp_path: Path
) -> None:
    newest, *older = checkpoints(finished)
    tensor_file = next(newest.glob("*.safetensors")).name
    for name in [*NAMES, tensor_file]:
        copy = tmp_path / name / "checkpoints"
        shutil.copytree(newest, copy / newest.name)
        shutil.copytree(older[0], copy / older[0].name)
        harm(copy / newest.name / name)
        if harm is not Path.unlink or name != "surgery.json":
            assert not is_whole(copy / newest.name), name
            assert [path.name for path in whole_checkpoints(tmp_path / name)] == [older[0].name]


def test_a_run_goes_on_from_the_newest_whole_checkpoint(
    finished: Path, root: Path, tmp_path: Path
) -> None:
    left = killed_at(4, finished, tmp_path / "run")
    (left / "checkpoints/checkpoint-4/trainer_state.json").unlink()
    (left / "checkpoints/checkpoint-3/surgery.json").unlink()
    (left / "checkpoints/checkpoint-9").mkdir()
    assert next(path.name for path in checkpoints(left)) == "checkpoint-9"
    finetune.train(made(root, left), QUIET, RESUME)
    assert same(finished, left)
    assert [path.name for path in whole_checkpoints(left)] == [
        f"checkpoint-{step}" for step in (4, 3, 2, 1)
    ]


def test_an_adapter_with_a_flipped_bit_is_passed_over(
    finished: Path, root: Path, tmp_path: Path
) -> None:
    left = killed_at(3, finished, tmp_path / "run")
    file = next((left / "checkpoints/checkpoint-3").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    finetune.train(made(root, left), QUIET, RESUME)
    assert same(finished, left)


def test_a_run_without_a_whole_checkpoint_says_so(
    finished: Path, root: Path, tmp_path: Path
) -> None:
    left = killed_at(1, finished, tmp_path / "run")
    (left / "checkpoints/checkpoint-1/optimizer.pt").unlink()
    with pytest.raises(RecipeError, match="no checkpoint to resume from; checkpoint-1 was not"):
        finetune.train(made(root, left), QUIET, RESUME)
    finetune.train(made(root, left), QUIET)  # nothing to lose: it starts again
    assert same(finished, left)


def test_damaged_records_of_a_run_are_errors(finished: Path, root: Path, tmp_path: Path) -> None:
    left = tmp_path / "run"
    shutil.copytree(finished, left)
    (left / "metrics.json").unlink()
    cut(left / "trained.json")
    words = tiny.overrides("sst2", *tiny.prepared("sst2", root), left)
    done = CliRunner().invoke(app, ["train", "sst2/lora", *words, *EACH_STEP, "--resume"])
    assert done.exit_code == 1
    assert "trained.json is damaged" in done.output.replace("\n", "")
    (left / "recipe.yaml").write_text("task: [sst2")
    done = CliRunner().invoke(app, ["eval", str(left)])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert "SURGERY_TRACEBACK" not in done.output


SETTINGS = [
    ("sst2/lora", []),
    ("sst2/inducer", ["training.gradient_accumulation_steps=2"]),
    ("sst2/prefix", ["training.eval_strategy=epoch", "training.weight_decay=0.1"]),
]


@pytest.mark.parametrize(
    ("name", "more"),
    [SETTINGS[0], *(pytest.param(*each, marks=pytest.mark.slow) for each in SETTINGS[1:])],
)
def test_a_run_resumed_inside_an_epoch_ends_as_the_unbroken_one(
    name: str, more: list[str], root: Path, tmp_path: Path
) -> None:
    """Batches are grouped by length, of seven examples; the last batch of an epoch is smaller."""
    data = tiny.save_data("sst2", tmp_path / "data", 9)
    longer = [*EACH_STEP, f"data={data}", "training.max_steps=7", *more]
    whole = tmp_path / "whole"
    unbroken = recipe(name, root, whole, *longer)
    assert unbroken.training["train_sampling_strategy"] == "group_by_length"
    finetune.train(unbroken, QUIET)
    for step in range(1, 7):
        left = killed_at(step, whole, tmp_path / f"at{step}")
        finetune.train(recipe(name, root, left, *longer), QUIET, RESUME)
        assert same(whole, left), f"resumed at step {step}"
