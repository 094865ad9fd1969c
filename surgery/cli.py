"""Offer the library on the command line: ``surgery COMMAND``.

    methods     list the installed methods            train     run one recipe
    recipes     list recipes and tables               compare   run a table of recipes
    locate      show the sites of a model             eval      score a saved adapter again

An error of the library is printed without a traceback, and the exit code is 1; an interrupted run
exits with 130. Only the commands that need transformers and the trainer import them.
"""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import surgery
from surgery.errors import RecipeError, SurgeryError
from surgery_recipes.recipe_files import find_recipe, read_recipe, shipped_recipes, shipped_tables

app = typer.Typer(
    help="Parameter-efficient methods, spliced into any transformer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()


@app.command()
def methods() -> None:
    """List the installed methods and their options."""
    table = Table("method", "what it does", "options", title="methods")
    for name, cls in surgery.methods().items():
        first = (inspect.getdoc(cls) or "").split("\n", 1)[0]
        options = ", ".join(f"{f.name}={_default(f)!r}" for f in dataclasses.fields(cls))
        table.add_row(name, first, options)
    console.print(table)


@app.command()
def locate(
    model: Annotated[str, typer.Argument(help="hub id, or folder of a saved model")],
) -> None:
    """Show the attention and FFN sites of a transformers model."""
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(model)
        names = [n for n in (config.architectures or []) if hasattr(transformers, n)]
        cls = getattr(transformers, names[0]) if names else transformers.AutoModel
        loaded = cls.from_pretrained(model)
    except (OSError, ValueError) as error:
        _fail(f"{model!r} cannot be loaded: {error}")
    try:
        sites = surgery.locate(loaded)
    except SurgeryError as error:
        _fail(str(error))
    table = Table("site", "what", "heads", "kv", "d", "width", "ports", title=type(loaded).__name__)
    for s in sites:
        numbers = (s.heads, s.kv_heads, s.head_width) if s.kind == "attention" else ("", "", "")
        table.add_row(s.path, s.description, *map(str, numbers), str(s.width), " ".join(s.ports))
    console.print(table)
    console.print(f"{len(sites.attention)} attention and {len(sites.ffn)} FFN sites")


@app.command()
def recipes() -> None:
    """List the recipes that come with the package."""
    table = Table(title="recipes")
    table.add_column("recipe", no_wrap=True)  # users type this name
    for heading in ("task", "methods", "what it is"):
        table.add_column(heading, overflow="fold")
    try:
        for name, files in shipped_recipes().items():
            plan = read_recipe(files)
            used = " + ".join(entry["method"] for entry in plan.splice) or "fine-tuning"
            table.add_row(name, plan.task, used, plan.about)
    except SurgeryError as error:
        _fail(str(error))
    console.print(table)
    console.print(f"tables, for `surgery compare`: {', '.join(shipped_tables())}")


@app.command()
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
) -> None:
    """Run a recipe: train, score, save the adapter."""
    try:
        _transformers()
        from surgery_recipes.run import RunOptions
        from surgery_recipes.run import dry_run as try_recipe
        from surgery_recipes.run import train as train_recipe

        plan = read_recipe(find_recipe(recipe), override)
        if dry_run:
            try_recipe(plan, console)
        else:
            train_recipe(plan, console, RunOptions(resume, overwrite, wandb))
    except SurgeryError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command()
def compare(
    grid: Annotated[str, typer.Argument(help="a table from `surgery recipes`, or a YAML file")],
    override: Annotated[
        list[str] | None, typer.Argument(help="key=value for every run, such as data=PATH")
    ] = None,
    seeds: Annotated[int, typer.Option(help="number of seeds; 0 means the seeds of the grid")] = 0,
    output: Annotated[str, typer.Option(help="folder to write to, instead of the grid's")] = "",
) -> None:
    """Run the unfinished recipes of a table, and write tables and plots."""
    try:
        _transformers()
        from surgery_recipes.comparison import read_grid, run_grid

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
        if run_grid(plan, console):
            raise typer.Exit(1)
    except SurgeryError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        console.print("interrupted: run the same command again to continue")
        raise typer.Exit(130) from None


@app.command(name="eval")
def evaluate(run: Annotated[Path, typer.Argument(help="the folder of a finished run")]) -> None:
    """Score a saved adapter again, from its files alone."""
    try:
        if not (run / "recipe.yaml").is_file():
            raise RecipeError(f"{run}: no recipe.yaml here. Give the output folder of a run.")
        _transformers()
        from surgery_recipes.run import evaluate as score_again

        score_again(run, console)
    except SurgeryError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _default(field: dataclasses.Field[Any]) -> Any:
    """Return the default of an option, also one that a factory makes."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _transformers() -> Any:
    """Import transformers and return it, with its warnings off."""
    try:
        import transformers
    except ImportError:
        _fail("this command needs transformers. pip install 'surgery[hf]'")
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    return transformers


def _fail(message: str) -> NoReturn:
    """Print an error and exit with code 1."""
    # No wrapping and no markup: the message may hold a path, or `pip install 'surgery[recipes]'`.
    console.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    raise typer.Exit(1)
