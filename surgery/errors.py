"""The errors of the package: each says what, where, why, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SurgeryError(Exception):
    """Base of every error raised by ``surgery``; nothing has changed when it is raised."""


class CaptureError(SurgeryError):
    """A module's forward could not be captured as a graph."""


class SiteError(SurgeryError):
    """No site, or not the sites that were asked for."""


class PortError(SurgeryError):
    """A method asked for a port that a site does not have, or used one wrongly."""


class MethodError(SurgeryError):
    """A method is unknown, clashes with another, or has a bad option value."""


class SpliceError(SurgeryError):
    """A splice, removal or switch does not fit the state that the model is in."""


class StoreError(SurgeryError):
    """A saved adapter is damaged, or does not fit the model it is loaded into."""


class RecipeError(SurgeryError):
    """A recipe has an unknown key or a bad value, or its data or model are not as it says."""


def suggest(wrong: str, known: Iterable[str]) -> str:
    """``Did you mean 'query'? `` if a known name is near ``wrong``, else the empty string."""
    close = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}? " if close else ""
