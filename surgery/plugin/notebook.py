"""Show a result in a notebook, as a table."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


def html_table(
    heading: str, columns: Iterable[str], rows: Iterable[Iterable[object]], notes: Iterable[str]
) -> str:
    """Return a heading, a table and lines below it as HTML. All text is escaped."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    below = "".join(f"<div>{escape(note)}</div>" for note in notes)
    return f"<div>{escape(heading)}</div><table><tr>{head}</tr>{body}</table>{below}"
