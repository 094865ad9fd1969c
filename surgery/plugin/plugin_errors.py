"""Find out why a plugin is not there: the line at which it fails, or a group that nobody reads."""

from __future__ import annotations

import difflib
import traceback
from importlib.metadata import EntryPoint, entry_points

GROUP = "surgery"


def place_of(error: BaseException, module: str) -> str:
    """Return the last line of a plugin's own package that an error passed, or ''.

    Args:
        error: what was raised while the plugin was loaded.
        module: the module of its entry point; all modules of that package are the plugin's.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    package, found = module.partition(".")[0], ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__")).partition(".")[0] == package:
            found = f"{frame.f_code.co_filename}, line {line}"
    return found


def under_other_groups() -> list[str]:
    """Return a line for each entry point under a group whose name is almost ``surgery``."""
    groups = [group for group in entry_points().groups if _is_meant(group)]
    return [_told(point, group) for group in sorted(groups) for point in entry_points(group=group)]


def _is_meant(group: str) -> bool:
    """Whether a group of entry points looks like a misspelt ``surgery``."""
    start = group.lower().replace("-", "_").replace("_", ".").partition(".")[0]
    close = difflib.SequenceMatcher(None, start, GROUP).ratio() > 0.8
    return group != GROUP and close


def _told(point: EntryPoint, group: str) -> str:
    return (
        f"plugin {point.name!r} ({point.value}) is listed under the entry-point group {group!r}, "
        f"which is not read. Write [project.entry-points.{GROUP}] in its pyproject.toml, and "
        "install it again."
    )
