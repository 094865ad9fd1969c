"""Say as a unified diff how the code of hosts changes with what is spliced in."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from surgery.drawing.survey import Place


def unified(places: Iterable[Place]) -> str:
    """Return the diffs of edited places; those that change alike are told once."""
    groups: dict[int, list[Place]] = {}
    for place in places:
        if place.edited:
            groups.setdefault(id(place.first), []).append(place)
    return "\n".join(_diff(group) for group in groups.values())


def _diff(group: list[Place]) -> str:
    """Return the diff of the first place of a group, and name the others."""
    place, *others = group
    name = place.path or "the model"
    lines = [f"{child} wraps the call of {name}" for child in place.wraps]
    if place.graphs is not None and place.graphs.after is not None:
        before, after = (str(g).splitlines() for g in (place.graphs.before, place.graphs.after))
        lines += difflib.unified_diff(before, after, f"{name} before", f"{name} after", lineterm="")
    if others:
        lines.append(f"the same at {', '.join(other.path for other in others)}")
    return "".join(f"{line}\n" for line in lines)
