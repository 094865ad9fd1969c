"""Commands about models: ``surgery locate MODEL``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

import surgery
from surgery.cli.console import console, fail, import_transformers, no_traceback

commands = typer.Typer()


@commands.command()
@no_traceback()
def locate(
    model: Annotated[str, typer.Argument(help="hub id, or folder of a saved model")],
) -> None:
    """Show the attention and FFN sites of a transformers model."""
    transformers = import_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(model)
        names = [n for n in (config.architectures or []) if hasattr(transformers, n)]
        cls = getattr(transformers, names[0]) if names else transformers.AutoModel
        loaded = cls.from_pretrained(model)
    except (OSError, ValueError) as error:
        fail(f"{model!r} cannot be loaded: {error}")
    sites = surgery.locate(loaded)
    table = Table("site", "what", "heads", "kv", "d", "width", "ports", title=type(loaded).__name__)
    for s in sites:
        numbers = (s.heads, s.kv_heads, s.head_width) if s.kind == "attention" else ("", "", "")
        table.add_row(s.path, s.description, *map(str, numbers), str(s.width), " ".join(s.ports))
    console.print(table)
    console.print(f"{len(sites.attention)} attention and {len(sites.ffn)} FFN sites")
