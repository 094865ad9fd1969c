"""The errors of the package: each says what, where, why, and what to do next.

SurgeryError
  RefusedError      a call refused to act: nothing has changed
    CaptureError, SiteError, PortError, MethodError, SpliceError, StoreError, RecipeError
  ForwardError      a spliced model cannot finish a forward that has begun
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any


class SurgeryError(Exception):
    """Base of the library's errors. Control characters in a message are shown as escapes.

    Example:
        >>> try:
        ...     surgery.method("loar")
        ... except surgery.SurgeryError as error:
        ...     print(error)
        no method 'loar'. Did you mean 'lora'? ...
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(printable(x) if isinstance(x, str) else x for x in args))


class RefusedError(SurgeryError):
    """A call refused to act. Model and files are as they were before the call.

    Example:
        >>> try:
        ...     surgery.splice(model, "ia3", name="first")
        ... except surgery.RefusedError as error:
        ...     print("nothing has changed")
        nothing has changed
    """


class CaptureError(RefusedError):
    """A module's forward could not be captured as a graph.

    Example:
        >>> try:
        ...     report = surgery.splice(model, "ia3")
        ... except surgery.CaptureError as error:
        ...     print(error)  # the line of the forward that no graph can hold
    """


class SiteError(RefusedError):
    """No site was found, or the sites found are not those that were asked for.

    Example:
        >>> surgery.locate(torch.nn.Linear(2, 2), torch.ones(1, 2))
        Traceback (most recent call last):
            ...
        surgery.errors.SiteError: ...
    """


class PortError(RefusedError):
    """A method asked for a port that a site lacks, or used a port wrongly.

    Example:
        >>> surgery.insert(model, sites.ffn[0], "quer", torch.nn.Identity())
        Traceback (most recent call last):
            ...
        surgery.errors.PortError: ...
    """


class MethodError(RefusedError):
    """A method is unknown, clashes with another, or has a bad option value.

    Example:
        >>> surgery.method("lora", rank=-1)
        Traceback (most recent call last):
            ...
        surgery.errors.MethodError: ...
    """


class SpliceError(RefusedError):
    """A splice, removal or switch does not fit the state that the model is in.

    Example:
        >>> surgery.remove(model, "third")
        Traceback (most recent call last):
            ...
        surgery.errors.SpliceError: ...
    """


class StoreError(RefusedError):
    """A saved adapter is damaged, or does not fit the model it is loaded into.

    Example:
        >>> surgery.load(model, "nowhere")
        Traceback (most recent call last):
            ...
        surgery.errors.StoreError: ...
    """


class RecipeError(RefusedError):
    """A recipe has an unknown key or a bad value, or its data or model do not match it.

    Example:
        >>> surgery.task("sst3")
        Traceback (most recent call last):
            ...
        surgery.errors.RecipeError: ...
    """


class ForwardError(SurgeryError):
    """A spliced model cannot finish a forward that has begun.

    Parameters and splices are as they were. Layers before the failing one have run, so a KV cache
    may have grown: start the generation again with a fresh cache.

    Example:
        >>> report = surgery.replace(model, sites.ffn[0], "output", lambda y: y[:1])
        >>> model(**inputs)
        Traceback (most recent call last):
            ...
        surgery.errors.ForwardError: ...
    """


def suggest(wrong: str, known: Iterable[str]) -> str:
    """Return ``Did you mean 'query'? `` if a known name is near ``wrong``, else ''.

    Example:
        >>> surgery.suggest("loar", ["lora", "prefix"])
        "Did you mean 'lora'? "
    """
    close = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}? " if close else ""


class _Line(reprlib.Repr):
    """The ``repr`` of parts of a value: long bytes and texts are cut before they are written."""

    def repr1(self, x: Any, level: int) -> str:
        if isinstance(x, (bytes, bytearray, memoryview)):
            kind, part = type(x).__name__, bytes(x[: self.maxstring])
            return f"<{kind} of {len(x):,}: {part!r}...>" if len(x) > len(part) else repr(x)
        if isinstance(x, str):  # a subclass, too
            return self.repr_str(str(x), level)
        if isinstance(x, BaseException):
            parts = [x[:1000] if isinstance(x, (str, bytes)) else x for x in x.args]
            if all(isinstance(part, (str, bytes, int)) for part in parts):
                return self.repr_instance(_Named(type(x).__name__, parts), level)
        return super().repr1(x, level)


class _Named:
    """What has the ``repr`` of an exception with these arguments."""

    def __init__(self, name: str, parts: list[Any]) -> None:
        self.name, self.parts = name, parts

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(map(repr, self.parts))})"


_LINE = _Line()
_LINE.maxstring, _LINE.maxother = 80, 120


def shown(value: Any) -> str:
    """Return the ``repr`` of a value for a message: about a line of it, whatever it is."""
    try:
        return printable(_LINE.repr(value))
    except Exception:  # an int of too many digits, or a class whose repr fails
        return f"<{type(value).__name__}>"


def printable(text: str) -> str:
    """Return a text with its control characters written as escapes, but for line ends.

    A name in a file may hold what moves the cursor of a terminal or hides a line.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
