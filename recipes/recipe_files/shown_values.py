"""Show values of a user's file in error messages, at most one line of each."""

from __future__ import annotations

import reprlib

LINE = 120  # characters

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxtuple = 3, 8, 12, 12
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = LINE


def shown(value: object) -> str:
    """``repr(value)``, cut to one line whatever the size of the value."""
    return short(_SHORT.repr(value))


def short(text: str) -> str:
    """A text on one line, cut to 120 characters."""
    line = " ".join(text[: 4 * LINE].split())
    return line if len(text) <= 4 * LINE and len(line) <= LINE else f"{line[: LINE - 4]} ..."


def reason(error: Exception) -> str:
    """What an error of another library says, cut to a few lines.

    An error without a class of that library, such as a ``KeyError``, is named.
    """
    text = str(error).strip()
    if isinstance(error, (LookupError, TypeError, AttributeError, RecursionError)) or not text:
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= 4 * LINE else f"{text[: 4 * LINE]} ..."
