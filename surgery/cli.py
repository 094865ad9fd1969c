"""The command line: ``surgery methods``, ``locate``, ``train`` and ``eval``."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

import surgery
from surgery.errors import SurgeryError
from surgery.recipe import RecipeError, read_recipe

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
        options = ", ".join(f"{f.name}={f.default!r}" for f in dataclasses.fields(cls))
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
def train(
    recipe: Annotated[Path, typer.Argument(help="a YAML recipe")],
    override: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as training.max_steps=10")
    ] = None,
) -> None:
    """Run a recipe: train, score, save the adapter."""
    try:
        plan = read_recipe(recipe, override)
        _transformers()
        from surgery_recipes import finetune

        finetune.train(plan, console)
    except SurgeryError as error:
        _fail(str(error))


@app.command(name="eval")
def evaluate(run: Annotated[Path, typer.Argument(help="the folder of a finished run")]) -> None:
    """Score a saved adapter again, from its files alone."""
    try:
        if not (run / "recipe.yaml").is_file():
            raise RecipeError(f"{run}: no recipe.yaml here. Give the output folder of a run.")
        _transformers()
        from surgery_recipes import finetune

        finetune.evaluate(run, console)
    except SurgeryError as error:
        _fail(str(error))


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        _fail("this command needs transformers. pip install 'surgery[hf]'")
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    return transformers


def _fail(message: str) -> NoReturn:
    console.print(f"[bold red]error:[/] {message}", highlight=False)
    raise typer.Exit(1)
