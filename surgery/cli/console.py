"""Hold what every command needs: the console, and errors without tracebacks.

An error is printed without a traceback, and the exit code is 1; with ``SURGERY_TRACEBACK=1`` it is
raised. An interrupted run exits with 130. Only the commands that need transformers import it.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from surgery.errors import SurgeryError

console = Console(markup=False, emoji=False)  # names may hold brackets


@contextmanager
def no_traceback() -> Iterator[None]:
    """Print an error in place of its traceback, and exit with code 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name may hold any bytes
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except Exception as error:
        if os.environ.get("SURGERY_TRACEBACK") == "1":
            raise
        if isinstance(error, SurgeryError):
            fail(str(error))
        fail(f"{type(error).__name__}: {error}\nSURGERY_TRACEBACK=1 shows where it happened.")


def import_transformers() -> Any:
    """Import transformers and return it, with its warnings off."""
    try:
        import transformers
    except ImportError:
        fail("this command needs transformers. pip install 'surgery[hf]'")
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    return transformers


def fail(message: str) -> NoReturn:
    """Print an error and exit with code 1."""
    # No wrapping and no markup: the message may hold a path, or `pip install 'surgery[recipes]'`.
    console.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    raise typer.Exit(1)
