"""Write the code of a listing as HTML: ports in colour, sources beside it, changes marked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from html import escape

from surgery.drawing.listing import Listing


def code(listing: Listing) -> str:
    """Return the lines of a listing."""
    ports = _ports(listing)
    return "".join(_line(n, text, note, ports) for n, text, note in listing.lines())


def changes(before: Listing, after: Listing) -> str:
    """Return the lines of a listing, with those that are new marked, and those that are gone."""
    ports = _ports(before) | _ports(after)
    return "".join(
        _line(n, text, note, ports, sign) for sign, (n, text, note) in _compared(before, after)
    )


def _compared(before: Listing, after: Listing) -> Iterator[tuple[str, tuple[int | None, str, str]]]:
    """Yield each line with ``+`` if only the later listing has it, ``-`` if only the earlier."""
    old, new = before.lines(), after.lines()
    texts = [[text for _, text, _ in lines] for lines in (old, new)]
    matcher = SequenceMatcher(None, texts[0], texts[1], autojunk=False)
    for what, a, b, c, d in matcher.get_opcodes():
        if what == "equal":
            yield from ((" ", line) for line in new[c:d])
        else:
            yield from (("-", (None, *line[1:])) for line in old[a:b])
            yield from (("+", line) for line in new[c:d])


def _ports(listing: Listing) -> set[str]:
    return {step.variable for step in listing.steps if step.ports and step.variable}


def _line(number: int | None, text: str, note: str, ports: set[str], sign: str = " ") -> str:
    kind = {"+": "l new", "-": "l old"}.get(sign, "l")
    step = "" if number is None else f' data-n="{number}"'
    shown = escape(text, quote=False)
    if ports:
        names = "|".join(sorted(ports, key=len, reverse=True))
        shown = re.sub(rf"(?<![\w.])(?:{names})(?!\w|=)", r"<b>\g<0></b>", shown)
    mark = {"+": "+", "-": "&minus;"}.get(sign, "")
    return (
        f'<div class="{kind}"{step}><span class="s">{mark}</span>'
        f'<span class="c">{shown}</span><span class="w">{escape(note)}</span></div>'
    )
