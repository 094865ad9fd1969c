"""Commands for authors of methods: ``surgery new NAME``, ``surgery check NAME``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import surgery
from surgery.cli.console import console, fail, import_transformers, no_traceback
from surgery.cli.scaffold import Kind, write_package
from surgery.testing import check_method
from surgery_recipes.recipe_files import override

commands = typer.Typer()


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
