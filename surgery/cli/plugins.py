"""Commands about plugins: ``surgery methods``, ``new NAME``, ``check NAME``, ``doctor``."""

from __future__ import annotations

import dataclasses
import inspect
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

import surgery
from surgery.cli.console import console, fail, import_transformers, no_traceback
from surgery.cli.scaffold import Kind, write_package
from surgery.plugin import installed, plugin_problems
from surgery.testing import check_method
from surgery_recipes.recipe_files import override

LIBRARIES = (
    "torch", "transformers", "accelerate", "safetensors", "pluggy", "huggingface_hub", "peft",
    "trl", "bitsandbytes", "torchao", "datasets",
)  # fmt: skip
commands = typer.Typer()


@commands.command()
@no_traceback()
def methods() -> None:
    """List the installed methods, their options and the packages that they come from."""
    origin = {
        name: f"{plugin.package} {plugin.version}"
        for plugin in installed()
        for name in plugin.offers
    }
    table = Table("method", "what it does", title="methods")
    table.add_column("options", overflow="fold")
    table.add_column("from")
    for name, cls in surgery.methods().items():
        first = (inspect.getdoc(cls) or "").split("\n", 1)[0]
        options = ", ".join(f"{f.name}={_default(f)!r}" for f in dataclasses.fields(cls))
        table.add_row(name, first, options, origin.get(name, "surgery.register"))
    console.print(table)
    for problem in plugin_problems():
        console.print(problem, highlight=False)


@commands.command()
@no_traceback()
def doctor() -> None:
    """Show versions, devices and plugins; exit with 1 if a plugin does not load."""
    table = Table("what", "version", title="surgery")
    table.add_row("surgery", surgery.__version__)
    table.add_row("Python", f"{platform.python_version()}, {sys.platform}")
    for name in LIBRARIES:
        try:
            table.add_row(name, version(name))
        except PackageNotFoundError:
            table.add_row(name, "not installed")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    threads = torch.get_num_threads()
    table.add_row("devices", ", ".join([*gpus, f"CPU with {threads} threads"]))
    console.print(table)
    plugins = Table("plugin", "from", "offers", "health", title="plugins")
    for plugin in installed():
        origin = f"{plugin.package} {plugin.version}"
        health = "does not load" if plugin.problem else "ok"
        plugins.add_row(plugin.name, origin, ", ".join(plugin.offers), health)
    console.print(plugins)
    problems = plugin_problems()
    for problem in problems:
        console.print(problem, highlight=False)
    raise typer.Exit(1 if problems else 0)


@commands.command()
@no_traceback()
def new(
    name: Annotated[str, typer.Argument(help="the method's name, such as my_method")],
    like: Annotated[Kind, typer.Option(help="what the method starts from")] = Kind.edit,
    folder: Annotated[
        Path | None, typer.Option(help="folder to write to, instead of surgery-NAME")
    ] = None,
) -> None:
    """Write a package with a method of your own, which passes its test as it stands."""
    made = write_package(name, like, folder)
    console.print(f"wrote {made}: {', '.join(sorted(p.name for p in made.iterdir()))}")
    console.print(f"next: pip install -e {made}, surgery check {name}, then edit it")


@commands.command()
@no_traceback()
def check(
    name: Annotated[str, typer.Argument(help="a name from `surgery methods`")],
    option: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as rank=4 ports=[query,value]")
    ] = None,
    exempt: Annotated[
        list[str] | None, typer.Option(help="LAW=REASON: do not try a law, and say why")
    ] = None,
) -> None:
    """Check the contract of an installed method on small models."""
    import_transformers()
    options: dict[str, Any] = {}
    for text in option or []:
        override(options, text)
    reasons = dict(text.partition("=")[::2] for text in exempt or [])
    try:
        contract = check_method(surgery.method(name, **options), exempt=reasons)
    except AssertionError as error:
        fail(str(error))
    console.print(repr(contract), highlight=False)


def _default(field: dataclasses.Field[Any]) -> Any:
    """Return the default of an option, also one that a factory makes."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
