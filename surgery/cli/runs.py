"""Commands that train and score: ``surgery train``, ``compare``, ``eval``, ``diagnose``."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from surgery.cli.console import console, import_transformers, no_traceback
from surgery.errors import RecipeError
from surgery_recipes.recipe_files import find_recipe, read_recipe

commands = typer.Typer()
Trust = Annotated[
    bool, typer.Option("--trust", help="import the Python package of model=package:NAME unasked")
]


@commands.command()
@no_traceback()
def train(
    recipe: Annotated[str, typer.Argument(help="a name from `surgery recipes`, or a YAML file")],
    override: Annotated[
        list[str] | None,
        typer.Argument(help="key=value, such as model=PATH data=PATH training.max_steps=10"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="build everything, run one batch, train nothing")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="continue from the last checkpoint in the run folder")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace the files in the run folder")
    ] = False,
    wandb: Annotated[bool, typer.Option("--wandb", help="log to Weights & Biases")] = False,
    trust: Trust = False,
) -> None:
    """Run a recipe: train, score, save the adapter."""
    import_transformers()
    from surgery_recipes.run import RunOptions
    from surgery_recipes.run import dry_run as try_recipe
    from surgery_recipes.run import train as train_recipe

    plan = read_recipe(find_recipe(recipe), override)
    trust = _trusted([plan.model], trust)
    if dry_run:
        try_recipe(plan, console, trust)
    else:
        train_recipe(plan, console, RunOptions(resume, overwrite, wandb, trust))


@commands.command()
@no_traceback()
def compare(
    grid: Annotated[str, typer.Argument(help="a table from `surgery recipes`, or a YAML file")],
    override: Annotated[
        list[str] | None, typer.Argument(help="key=value for every run, such as data=PATH")
    ] = None,
    seeds: Annotated[int, typer.Option(help="number of seeds; 0 means the seeds of the grid")] = 0,
    output: Annotated[str, typer.Option(help="folder to write to, instead of the grid's")] = "",
    budget: Annotated[
        str, typer.Option(help="time for all runs, such as 1h: fewer steps if they take longer")
    ] = "",
    wide: Annotated[bool, typer.Option("--wide", help="print all columns of the table")] = False,
    diagnosed: Annotated[
        bool, typer.Option("--diagnose/--no-diagnose", help="say on the page why rows differ")
    ] = True,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="choose each row's learning rate on validation first")
    ] = False,
    trust: Trust = False,
) -> None:
    """Run the unfinished recipes of a table, and write tables and plots."""
    import_transformers()
    from surgery_recipes.comparison import models, read_grid, run_grid, seconds_of

    within = seconds_of(budget) if budget else None
    plan = dataclasses.replace(read_grid(grid), given=override or [])
    for text in plan.given:
        if text.startswith(("output=", "training.seed=")):
            raise RecipeError(f"{text}: the table sets this key. Use --output and --seeds.")
    if seeds < 0:
        raise RecipeError(f"--seeds {seeds}: the number of seeds must be 1 or more.")
    if seeds:
        plan = dataclasses.replace(plan, seeds=list(range(1, seeds + 1)))
    if output:
        plan = dataclasses.replace(plan, output=output)
    trust = _trusted(models(plan), trust)
    try:
        failed = run_grid(plan, console, trust, sweep, wide, diagnosed, within)
    except KeyboardInterrupt:
        console.print("interrupted: run the same command again to continue")
        raise
    if failed:
        raise typer.Exit(1)


@commands.command(name="eval")
@no_traceback()
def evaluate(
    run: Annotated[Path, typer.Argument(help="the folder of a finished run")],
    override: Annotated[
        list[str] | None,
        typer.Argument(help="key=value, such as data=PATH limit.test=100 data.beams=5"),
    ] = None,
    lm_eval: Annotated[
        str,
        typer.Option(
            "--lm-eval", help="tasks of lm-evaluation-harness, or YAML files of them: NAME,NAME"
        ),
    ] = "",
    limit: Annotated[
        int, typer.Option(help="with --lm-eval: examples of each task; 0 means all")
    ] = 0,
    trust: Trust = False,
) -> None:
    """Score a saved adapter again, from its files alone, or on tasks of lm-evaluation-harness."""
    if not (run / "recipe.yaml").is_file():
        raise RecipeError(f"{run}: no recipe.yaml here. Give the output folder of a run.")
    import_transformers()
    from surgery_recipes.run import evaluate as score_again
    from surgery_recipes.run import evaluate_by_harness, recipe_of_run

    trust = _trusted([recipe_of_run(run, override or []).model], trust)
    if lm_eval:
        names = [name.strip() for name in lm_eval.split(",")]
        evaluate_by_harness(run, names, console, limit, trust)
    else:
        score_again(run, console, trust, override or [])


@commands.command()
@no_traceback()
def diagnose(
    runs: Annotated[
        list[Path],
        typer.Argument(help="the folder of a finished run, and of others to draw losses of"),
    ],
    minus: Annotated[
        Path | None, typer.Option(help="a run whose scores are subtracted, such as fine-tuning's")
    ] = None,
    examples: Annotated[int, typer.Option(help="scored examples to measure attention on")] = 128,
    trust: Trust = False,
) -> None:
    """Say why a run scores as it does: attention, updates, lengths of inputs, first losses."""
    import_transformers()
    from surgery_recipes.diagnosis import diagnose as diagnose_runs
    from surgery_recipes.run import recipe_of_run

    if examples < 1:
        raise RecipeError(f"--examples {examples}: the number must be 1 or more.")
    there = [run for run in runs[:1] if (run / "recipe.yaml").is_file()]
    trust = _trusted([recipe_of_run(run).model for run in there], trust)
    diagnose_runs(runs, console, examples, minus, trust)


def _trusted(models: Iterable[str], trust: bool) -> bool:
    """Ask for each package of code that would be imported, if somebody is there to answer."""
    from surgery_recipes.run import what_is_imported

    imported = list(filter(None, map(what_is_imported, models)))
    if trust or not imported or not _somebody_is_there():
        return trust  # what is not trusted is refused where it would be imported
    for each in imported:
        console.print(each)
        typer.confirm("Import it?", abort=True)
    return True


def _somebody_is_there() -> bool:
    """Whether a question can be asked and answered."""
    return sys.stdin.isatty() and sys.stdout.isatty()
