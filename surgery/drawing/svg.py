"""Draw a listing as SVG: a box for each operation, ports by name, what is spliced in in colour.

Colours come from ``drawing.css``. A page has that style once; a drawing that stands alone brings it
along, in its light colours.
"""

from __future__ import annotations

from html import escape
from importlib.resources import files
from itertools import pairwise

from surgery.drawing.layout import HIGH, PADDING, ROW, Box, laid_out
from surgery.drawing.listing import Listing

_MARGIN = 12
_CLEAR = HIGH / 2 + 2
_LEAN = 0.5  # of an edge that passes a row, so that it clears the boxes there


def svg(listing: Listing, label: str, alone: bool = False) -> str:
    """Return a drawing.

    Args:
        label: what it shows, for readers who hear it.
        alone: whether the drawing stands in a file of its own.
    """
    layout = laid_out(listing)
    width, height = layout.width + 2 * _MARGIN, layout.height + 2 * _MARGIN
    parts = [_edge(way) for way in layout.edges] + [_box(box) for box in layout.boxes]
    own = ' xmlns="http://www.w3.org/2000/svg"' if alone else ""
    style = f"<style>{style_of_drawings()}</style>" if alone else ""
    return (
        f'<svg{own} class="graph" role="img" aria-label="{escape(label)}" '
        f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'style="--w:{width:.0f}">'
        f"{style}{''.join(parts)}</svg>"
    )


def style_of_drawings() -> str:
    """Return the CSS of a drawing."""
    return files("surgery.drawing").joinpath("drawing.css").read_text(encoding="utf-8")


def _box(box: Box) -> str:
    x, y = box.x - box.width / 2 + _MARGIN, _top(box)
    kinds = ["box", box.kind, *(["new"] if box.inserted else []), *(["port"] if box.ports else [])]
    middle = box.x + _MARGIN
    texts = [(box.label, "what", y + box.height / 2 + 4)]
    if box.ports:
        texts = [(box.ports, "name", y + 15), (box.label, "what", y + 28)]
    lines = "".join(
        f'<text class="{kind}" x="{middle:.1f}" y="{at:.1f}">{escape(text)}</text>'
        for text, kind, at in texts
    )
    numbers = " ".join(map(str, box.steps))
    return (
        f'<g class="{" ".join(kinds)}" data-n="{numbers}"><title>{escape(box.title)}</title>'
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{box.width:.1f}" height="{box.height}" rx="5"/>'
        f"{lines}</g>"
    )


def _top(box: Box) -> float:
    """Return where a box begins: boxes of one row have one middle."""
    return _middle(box) - box.height / 2


def _middle(box: Box) -> float:
    return box.row * ROW + 18 + _MARGIN


def _edge(way: list[Box]) -> str:
    """Draw an edge from the lower side of its first box to the upper side of its last."""
    first, last = way[0], way[-1]
    new = " new" if first.inserted or last.inserted else ""
    points = [(first.x + _MARGIN + _aside(first, way[1]), _top(first) + first.height)]
    points += [(box.x + _MARGIN, y) for box in way[1:-1] for y in _passes(box, way)]
    points += [(last.x + _MARGIN + _aside(last, way[-2]), _top(last))]
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for (x, y), (to_x, to_y), lean, to_lean in zip(
        points, points[1:], *[_leans(points)[i:] for i in (0, 1)], strict=False
    ):
        third = (to_y - y) / 3
        path += (
            f"C{x + lean * third:.1f} {y + third:.1f} "
            f"{to_x - to_lean * third:.1f} {to_y - third:.1f} {to_x:.1f} {to_y:.1f}"
        )
    return f'<path class="edge{new}" d="{path}"/>'


def _passes(point: Box, way: list[Box]) -> list[float]:
    """Return the heights at which an edge passes a row.

    It turns into its first row above the boxes, and out of its last below them: it cuts no corner.
    """
    ends = [_middle(point) - _CLEAR] if point is way[1] else []
    ends += [_middle(point) + _CLEAR] if point is way[-2] else []
    return ends or [_middle(point)]


def _leans(points: list[tuple[float, float]]) -> list[float]:
    """Return how far an edge leans at each of its points: upright at both ends and in a bend.

    In between it is the harmonic mean of the leans on both sides, so that no edge overshoots.
    """
    pairs = pairwise(points)
    steps = [(to_x - x) / (to_y - y) for (x, y), (to_x, to_y) in pairs]
    means = [2 * a * b / (a + b) if a * b > 0 else 0.0 for a, b in pairwise(steps)]
    return [0.0, *(max(-_LEAN, min(_LEAN, mean)) for mean in means), 0.0]


def _aside(box: Box, other: Box) -> float:
    """Return how far from the middle of a box an edge to another begins: towards it, a little."""
    room = box.width / 2 - PADDING
    return max(-room, min(room, (other.x - box.x) * 0.25))
