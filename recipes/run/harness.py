"""Hand the model of a finished run to lm-evaluation-harness (Gao et al.), through its ``HFLM``.

The harness asks the spliced model itself, so nothing is merged. Its tasks are named as the harness
names them, or are YAML files of one's own, whose ``!function`` entries are code that it runs. The
data of the run's own task are not read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from surgery import RecipeError, suggest
from surgery_recipes.recipe_files import read_recipe, reason, shown, write_whole
from surgery_recipes.run.kinds import has_classes
from surgery_recipes.run.loaded import load_trained
from surgery_recipes.run.prepare import prepare_base
from surgery_recipes.run.trainer import training_arguments

RESULTS = "lm_eval.json"


def evaluate_by_harness(
    folder: Path, tasks: Sequence[str], console: Console, limit: int = 0, trust: bool = False
) -> dict[str, dict[str, float]]:
    """Score a finished run on tasks of lm-evaluation-harness, and write ``lm_eval.json``.

    Args:
        folder: the folder of the run.
        tasks: names of the harness's tasks, groups and tags, or paths of YAML files of tasks.
        console: where the scores are printed.
        limit: how many examples of each task to ask; 0 is all.
        trust: whether the package of ``model: package:NAME`` may be imported, whatever it is.

    Returns:
        The scores of each task, by the harness's names, such as ``acc,none``.

    Raises:
        RecipeError: the harness is not installed, has no such task, or fails; or the run's model
            does not write text. Nothing has been written.
    """
    if limit < 0:
        raise RecipeError(f"--limit {limit}: the number of examples must be 1 or more.")
    names, manager = _tasks(tasks)
    recipe = read_recipe(folder / "recipe.yaml")
    prepared = prepare_base(recipe, trust)
    if has_classes(prepared.task):
        raise RecipeError(
            f"--lm-eval: {folder} holds a model with the classes of task {recipe.task!r}, and the "
            "harness asks for text. Give the run of a task such as generate or webnlg."
        )
    made = training_arguments(recipe)
    model = load_trained(prepared, made, folder).eval()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    size = made.per_device_eval_batch_size
    try:
        asked = HFLM(pretrained=model, tokenizer=prepared.tokenizer, batch_size=size)
        found = simple_evaluate(
            asked, tasks=list(names), task_manager=manager, limit=limit or None, log_samples=False
        )
    except Exception as error:  # its tasks download, read and compute anything
        raise RecipeError(f"--lm-eval: the harness fails: {reason(error)}") from error
    assert found is not None  # it is None in other processes than the first
    scores = {
        name: {k: v for k, v in row.items() if isinstance(v, (int, float))}
        for name, row in found["results"].items()
    }
    kept = {"results": scores, "limit": limit, "versions": found.get("versions", {})}
    kept |= {"samples": found.get("n-samples", {}), "fewshot": found.get("n-shot", {})}
    write_whole(folder / RESULTS, json.dumps(kept, indent=1, default=str))
    console.print(_table(folder, scores))
    return scores


def _tasks(given: Sequence[str]) -> tuple[list[str], Any]:
    """The names of the tasks, and the harness's manager that knows them.

    Raises:
        RecipeError: the harness is not installed, or has no such task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RecipeError(
            "--lm-eval: lm-evaluation-harness is not installed. pip install 'surgery[lm-eval]'"
        ) from error
    files = [Path(name) for name in given if name.endswith((".yaml", ".yml"))]
    own = {file: _name_of(file) for file in files}
    named = [name for name in given if Path(name) not in own]
    if not given or not all(given):
        raise RecipeError("--lm-eval: name the tasks, separated by commas.")
    folders = sorted({str(file.resolve().parent) for file in files})
    manager = TaskManager(include_path=folders or None, include_defaults=bool(named))
    for name in [*own.values(), *named]:
        if name not in manager.all_tasks:
            raise RecipeError(
                f"--lm-eval: the harness has no task {shown(name)}. "
                f"{suggest(name, manager.all_tasks)}`lm-eval ls tasks` lists them; a task of your "
                "own is the path of its YAML file."
            )
    return [*own.values(), *named], manager


def _name_of(file: Path) -> str:
    """The name of the task in a YAML file of the harness.

    Raises:
        RecipeError: there is no such file, or it names no task.
    """
    if not file.is_file():
        raise RecipeError(f"--lm-eval: {shown(str(file))}: no such file.")
    for line in file.read_text().splitlines():  # its tags, such as !function, are not plain YAML
        key, colon, value = line.partition(":")
        if key == "task" and colon and value.split("#")[0].strip():
            return value.split("#")[0].strip().strip("\"'")
    raise RecipeError(f"--lm-eval: {file}: no line `task: NAME`, which a task of the harness has.")


def _table(folder: Path, scores: dict[str, dict[str, float]]) -> Table:
    made = Table(title=Text(f"{folder}: lm-evaluation-harness"))
    for heading in ("task", "score", "value"):
        made.add_column(Text(heading))
    for name, row in scores.items():
        for score, value in row.items():
            if "stderr" not in score:
                made.add_row(Text(name), Text(score.removesuffix(",none")), f"{value:.4f}")
    return made
