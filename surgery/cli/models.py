"""Commands about models: ``surgery locate``, ``diff``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import surgery
from surgery.cli.console import console, fail, import_transformers, no_traceback
from surgery_recipes.recipe_files import override

commands = typer.Typer()


Model = Annotated[str, typer.Argument(help="hub id, or folder of a saved model")]


@commands.command()
@no_traceback()
def locate(
    model: Model,
    html: Annotated[
        Path | None, typer.Option(help="write a page with every site's graph and code")
    ] = None,
    svg: Annotated[
        tuple[str, Path] | None,
        typer.Option(help="SITE FILE: draw the graph of one site", metavar="SITE FILE"),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="show what this method would insert; may be repeated")
    ] = None,
) -> None:
    """Show the attention and FFN sites of a transformers model."""
    for path in filter(None, (html, svg and svg[1])):
        if not path.absolute().parent.is_dir():
            fail(f"{path}: there is no folder {path.parent}. Make it first.")
    made = [surgery.method(name) for name in method or []] or None
    loaded = _loaded(model)
    sites = surgery.locate(loaded)
    table = Table("site", "what", "heads", "kv", "d", "width", "ports", title=type(loaded).__name__)
    for s in sites:
        numbers = (s.heads, s.kv_heads, s.head_width) if s.kind == "attention" else ("", "", "")
        table.add_row(s.path, s.description, *map(str, numbers), str(s.width), " ".join(s.ports))
    console.print(table)
    console.print(f"{len(sites.attention)} attention and {len(sites.ffn)} FFN sites")
    if html is None and svg is None and made is None:
        return
    seen = surgery.anatomy(loaded, made)
    if html is not None:
        console.print(f"wrote {seen.save(html)}", soft_wrap=True)
    if svg is not None:
        svg[1].write_text(seen.svg(svg[0]), encoding="utf-8")
        console.print(f"wrote {svg[1]}", soft_wrap=True)
    if html is None and svg is None:
        typer.echo(seen.diff(), nl=False)


@commands.command()
@no_traceback()
def diff(
    model: Model,
    method: Annotated[str, typer.Argument(help="a name from `surgery methods`")],
    option: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as rank=4 ports=[query,value]")
    ] = None,
    site: Annotated[str | None, typer.Option(help="the path of one site")] = None,
) -> None:
    """Show how a method would change the code of a model, as a unified diff."""
    options: dict[str, Any] = {}
    for text in option or []:
        override(options, text)
    made = surgery.method(method, **options)
    typer.echo(surgery.diff(_loaded(model), made, site), nl=False)


def _loaded(model: str) -> Any:
    """Load a model as the class that its config names."""
    transformers = import_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(model)
        names = [n for n in (config.architectures or []) if hasattr(transformers, n)]
        cls = getattr(transformers, names[0]) if names else transformers.AutoModel
        return cls.from_pretrained(model)
    except (OSError, ValueError) as error:
        fail(f"{model!r} cannot be loaded: {error}")
