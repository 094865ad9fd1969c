"""Join the commands of all files to one program: ``surgery COMMAND``.

    models.py      locate, diff
    plugins.py     methods, new, check, doctor
    runs.py        train, compare, eval, diagnose
    lists.py       recipes, runs
    adapters.py    inspect, merge, convert, generate, push

``surgery --install-completion`` makes the shell complete commands and options.
"""

from __future__ import annotations

from typing import Annotated

import typer

import surgery
from surgery.cli import adapters, lists, models, plugins, runs

app = typer.Typer(
    help="Parameter-efficient methods, spliced into any transformer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for part in (plugins, models, lists, runs, adapters):
    app.add_typer(part.commands)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"surgery {surgery.__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", help="show the version", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Parameter-efficient methods, spliced into any transformer."""
