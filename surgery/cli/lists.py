"""Commands that list what there is to run and what has run: ``surgery recipes``, ``runs``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from surgery.cli.console import console, import_transformers, no_traceback
from surgery.errors import RecipeError
from surgery_recipes.recipe_files import Recipe, read_recipe, shipped_recipes, shipped_tables

commands = typer.Typer()


@commands.command()
@no_traceback()
def recipes(
    about: Annotated[
        bool, typer.Option("--about", help="one line for each, with what it is")
    ] = False,
) -> None:
    """List the recipes that come with the package: tasks x rows."""
    plans = {name: read_recipe(files) for name, files in shipped_recipes().items()}
    if about:
        for name, plan in plans.items():
            console.print(Text(f"{name}: {plan.about}"))
        return
    tasks = list(dict.fromkeys(name.split("/")[0] for name in plans if "/" in name))
    table = Table(title="recipes: TASK/ROW, such as webnlg/inducer")
    table.add_column("row", no_wrap=True)  # users type this name
    for task in tasks:
        table.add_column(task, justify="center", no_wrap=True)
    table.add_column("methods", overflow="fold")
    for row in dict.fromkeys(name.split("/")[1] for name in plans if "/" in name):
        there = ["x" if f"{task}/{row}" in plans else "" for task in tasks]
        used = dict.fromkeys(_methods(p) for n, p in plans.items() if n.endswith(f"/{row}"))
        table.add_row(row, *there, "; ".join(used))
    console.print(table)
    for name, plan in plans.items():
        if "/" not in name:
            console.print(Text(f"{name}: {plan.about}"))
    console.print(f"tables, for `surgery compare`: {', '.join(shipped_tables())}")
    console.print("What each is: surgery recipes --about")


def _methods(plan: Recipe) -> str:
    used = " + ".join(entry["method"] for entry in plan.splice)
    return used or ("nothing is trained" if plan.frozen else "fine-tuning")


@commands.command()
@no_traceback()
def runs(
    folder: Annotated[Path, typer.Argument(help="the folder that holds runs")] = Path("runs"),
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="a setting that a run must have: task=sst2, method=lora, training.seed=1"
        ),
    ] = None,
    diff: Annotated[
        Path | None, typer.Option(help="another run: show in what FOLDER, a run, differs from it")
    ] = None,
) -> None:
    """List the runs below a folder with their scores, or tell two of them apart."""
    import_transformers()
    from surgery_recipes.run import compare_runs, find_runs

    if diff is not None:
        if where:
            raise RecipeError("--where chooses runs of a list, and --diff compares two. Take one.")
        table = Table("")
        for run in (folder, diff):
            table.add_column(Text(run.name or str(run)), overflow="fold")
        for name, *values in compare_runs(folder, diff):
            table.add_row(Text(name), *(Text("" if v is None else f"{v}") for v in values))
        console.print(table if table.row_count else "No difference in settings or scores.")
        return
    found = find_runs(folder, where or [])
    if not found:
        console.print(Text(f"{folder}: no such run."))
        return
    table = Table(title=Text(str(folder)))
    for heading in ("run", "methods", "score", "of the base", "training"):
        table.add_column(heading, overflow="fold")
    for each in found:
        name, value = next(iter(each.scores.items()), ("", None))
        done = (f"{each.percent:.2f} %", f"{each.seconds:.0f} s") if each.scores else ("", "")
        score = each.state if value is None else f"{name} {value:.4g}"
        place = str(each.folder.relative_to(folder))
        table.add_row(Text(place), Text(each.methods), Text(score), *done)
    console.print(table)
