"""Commands about saved adapters: ``inspect``, ``merge``, ``convert``, ``generate``, ``push``.

An adapter is a folder, or OWNER/NAME on the Hugging Face hub, that surgery or PEFT has saved. Its
base is loaded by the name that it was trained with; ``--base`` names another place.
"""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

import surgery
from surgery.cli.console import console, fail, import_transformers, no_traceback
from surgery.errors import StoreError

commands = typer.Typer()
Adapter = Annotated[str, typer.Argument(help="folder of an adapter, or OWNER/NAME on the hub")]
Output = Annotated[Path, typer.Argument(help="folder to write to; it must be new or empty")]
Base = Annotated[str, typer.Option(help="hub id or folder of the base, instead of the adapter's")]
Revision = Annotated[str, typer.Option(help="branch, tag or commit on the hub")]
Subfolder = Annotated[str, typer.Option(help="the folder in it that holds the adapter")]


class Format(str, Enum):
    """What an adapter can be converted to."""

    peft = "peft"


@commands.command()
@no_traceback()
def inspect(adapter: Adapter, revision: Revision = "", subfolder: Subfolder = "") -> None:
    """Show what a saved adapter holds; its base is not needed."""
    console.print(repr(surgery.inspect(adapter, revision or None, subfolder)), highlight=False)


@commands.command()
@no_traceback()
def merge(
    adapter: Adapter, output: Output, base: Base = "", revision: Revision = "",
    subfolder: Subfolder = "",
) -> None:  # fmt: skip
    """Fold an adapter into its base, and save a model that needs no surgery."""
    _require_empty(output)
    model, tokenizer = _adapted(adapter, base, revision, subfolder)
    console.print(repr(surgery.merge(model)), highlight=False)
    model.save_pretrained(output)
    if tokenizer is not None:
        tokenizer.save_pretrained(output)
    console.print(f"saved in {output}")


@commands.command()
@no_traceback()
def convert(
    adapter: Adapter,
    output: Output,
    to: Annotated[Format, typer.Option(help="the format to write")],
    base: Base = "",
    revision: Revision = "",
    subfolder: Subfolder = "",
) -> None:
    """Write an adapter in the format of another library."""
    _require_empty(output)
    model, _ = _adapted(adapter, base, revision, subfolder)
    save: Any = surgery.save
    save(model, output, format=to.value)
    console.print(f"saved in {output}, in the format of {to.value}")


@commands.command()
@no_traceback()
def generate(
    adapter: Adapter,
    prompt: Annotated[str, typer.Argument(help="the text to continue")],
    tokens: Annotated[int, typer.Option(min=1, help="how many new tokens at most")] = 64,
    sample: Annotated[bool, typer.Option("--sample", help="draw tokens; else greedy")] = False,
    base: Base = "",
    revision: Revision = "",
    subfolder: Subfolder = "",
) -> None:
    """Continue a text with a base and an adapter."""
    model, tokenizer = _adapted(adapter, base, revision, subfolder)
    if not model.can_generate() or tokenizer is None:
        fail(f"{type(model).__name__} with {adapter} generates no text, or has no tokenizer.")
    given = tokenizer(prompt, return_tensors="pt").to(model.device)
    made = model.generate(**given, max_new_tokens=tokens, do_sample=sample)
    typer.echo(tokenizer.decode(made[0], skip_special_tokens=True))


@commands.command()
@no_traceback()
def push(
    adapter: Annotated[Path, typer.Argument(help="folder of an adapter")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the hub")],
    revision: Revision = "",
    subfolder: Annotated[str, typer.Option(help="the folder in the repository")] = "",
    private: Annotated[bool, typer.Option("--private", help="make a new one private")] = False,
) -> None:
    """Upload an adapter to the Hugging Face hub, with a model card; never its base.

    Scores of the run come from the metrics.json in the folder above, if there is one.
    """
    address = surgery.push(
        adapter, repository, revision=revision or None, subfolder=subfolder,
        private=private or None, scores=_scores(adapter),
    )  # fmt: skip
    console.print(address, soft_wrap=True)


def _scores(adapter: Path) -> dict[str, float]:
    """Return the scores of the run that an adapter is from; none if there is no such file."""
    try:
        found = json.loads((adapter.resolve().parent / "metrics.json").read_text())
        scores = found["rows"][-1]["scores"]
        return {str(k): float(v) for k, v in scores.items() if isinstance(v, (int, float))}
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return {}


def _adapted(adapter: str, base: str, revision: str, subfolder: str) -> tuple[Any, Any]:
    """Return the base of an adapter with the adapter in it, and its tokenizer or None."""
    saved = surgery.inspect(adapter, revision or None, subfolder)
    name = base or saved.base_name
    if not name:
        fail(f"{adapter} does not say which base it was made for. Give --base.")
    transformers = import_transformers()
    loadable: Any = _class(transformers, saved.base, name)
    if loadable is None:
        fail(f"{adapter} is for a {saved.base}, which is no model of transformers.")
    typer.echo(f"base: {saved.base} {name}", err=True)
    try:
        model = loadable.from_pretrained(name)
    except (OSError, ValueError) as error:
        fail(f"the base {name!r} cannot be loaded: {error}\nGive --base to load it from elsewhere.")
    tokenizer = _tokenizer(transformers, saved.folder, name)
    if tokenizer is not None and len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    surgery.load(model, saved.folder, keep=list(saved.kept))
    return model.eval(), tokenizer


def _class(transformers: Any, base: str, name: str) -> Any:
    """Return the class that loads a base, None if it is no model of transformers.

    A config of PEFT may name a task alone, or nothing: then the base's own config says it.
    """
    if base == "a model":
        try:
            found = transformers.AutoConfig.from_pretrained(name).architectures or [""]
        except (OSError, ValueError) as error:
            fail(f"the base {name!r} cannot be loaded: {error}\nGive --base to load it elsewhere.")
        base = found[0]
    kind = getattr(transformers, base, None)
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    return kind if known or base.startswith("AutoModelFor") else None


def _tokenizer(transformers: Any, *places: Any) -> Any:
    """Return the tokenizer of the first of these places that has one, or None."""
    for place in places:
        try:
            return transformers.AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError, KeyError):
            continue
    return None


def _require_empty(output: Path) -> None:
    """Raise unless a folder is new or empty."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise StoreError(f"{output} is there already, and not an empty folder. Name another one.")
