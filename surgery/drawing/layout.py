"""Place the steps of a listing: a row for each depth, few crossings, edges around the boxes.

steps ──boxes──► Box         steps that only reshape one value share a box
      ──rows───► row         the longest way from an input; an input stands above its reader
      ──order──► place       barycentres, down and up; a long edge has a point in each row
      ──x──────► position    each box near the middle of what it is joined to
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from surgery.drawing.listing import Listing, Step

_SHAPES = (
    "view reshape transpose permute contiguous flatten unflatten unsqueeze squeeze expand to mT"
).split()
CHARACTER, PADDING, GAP, ROW = 6.65, 9, 16, 64
HIGH, LOW = 36, 24  # boxes with and without a port
_SWEEPS = 12


@dataclass(eq=False)
class Box:
    """One box, or a point where a long edge passes a row.

    Attributes:
        steps: the numbers of the steps that it stands for; empty for a point.
        ports, label: what is written in it.
        title: the lines of code and the shape, shown where a pointer rests.
        row, x: where its middle is.
    """

    steps: list[int]
    ports: str
    label: str
    title: str
    inserted: bool
    kind: str
    row: int = 0
    x: float = 0.0
    above: list[Box] = field(default_factory=list, repr=False)
    below: list[Box] = field(default_factory=list, repr=False)

    @property
    def width(self) -> float:
        """The width of the box."""
        if not self.steps:
            return 22.0
        return max(len(self.ports), len(self.label), 3) * CHARACTER + 2 * PADDING

    @property
    def height(self) -> float:
        """The height of the box."""
        return HIGH if self.ports else LOW


@dataclass
class Layout:
    """Placed boxes, and the edges between them as the boxes and points that they pass."""

    boxes: list[Box]
    edges: list[list[Box]]

    @property
    def width(self) -> float:
        """The width of the whole."""
        every = [box for way in [self.boxes, *self.edges] for box in way]
        return max((box.x + box.width / 2 for box in every), default=0.0)

    @property
    def height(self) -> float:
        """The height of the whole."""
        return max((box.row for box in self.boxes), default=0) * ROW + HIGH


def laid_out(listing: Listing) -> Layout:
    """Place the steps of a listing."""
    boxes, pairs = _boxes(listing.steps)
    _set_rows(boxes)
    edges = [_with_points(a, b) for a, b in pairs]
    points = [box for edge in edges for box in edge[1:-1]]
    rows: list[list[Box]] = [[] for _ in range(max((b.row for b in boxes), default=0) + 1)]
    for box in [*boxes, *points]:
        rows[box.row].append(box)
    _order(rows)
    _spread(rows)
    left = min((box.x - box.width / 2 for box in [*boxes, *points]), default=0.0)
    for box in [*boxes, *points]:
        box.x -= left
    return Layout(boxes, edges)


def _boxes(steps: list[Step]) -> tuple[list[Box], list[tuple[Box, Box]]]:
    """Return the boxes of the drawn steps, and which feeds which."""
    drawn = _feeds(steps)
    readers: dict[int, list[int]] = {n: [] for n in drawn}
    for n, sources in drawn.items():
        for source in sources:
            readers[source].append(n)
    boxes: dict[int, Box] = {}
    for n, sources in drawn.items():
        step = steps[n]
        if step.kind == "input" and not readers[n]:
            continue
        before = boxes.get(sources[0]) if len(sources) == 1 else None
        alone = before is not None and readers[sources[0]] == [n] and not before.ports
        if before is not None and alone and _folds(step) and before.kind == "shape":
            before.steps.append(n)
            before.ports = ", ".join(step.ports)
            before.label, before.title = (
                f"{before.label}, {step.label}",
                f"{before.title}\n{step.text}",
            )
            boxes[n] = before
            continue
        title = "\n".join(filter(None, [step.text or step.label, step.shape, step.where]))
        kind = "shape" if _folds(step) else step.kind
        label = step.label if len(step.label) <= 34 else f"{step.label[:33]}…"
        boxes[n] = Box([n], ", ".join(step.ports), label, title, step.inserted, kind)
    found: dict[int, Box] = {id(box): box for box in boxes.values()}
    pairs: dict[tuple[int, int], tuple[Box, Box]] = {}
    for n, sources in drawn.items():
        for source in sources:
            if n in boxes and boxes[source] is not boxes[n]:
                pairs[id(boxes[source]), id(boxes[n])] = boxes[source], boxes[n]
    for a, b in pairs.values():
        a.below.append(b)
        b.above.append(a)
    return [*found.values()], [*pairs.values()]


def _folds(step: Step) -> bool:
    """Whether a step only gives one value another shape."""
    return step.kind == "method" and step.label in _SHAPES and not step.inserted


def _feeds(steps: list[Step]) -> dict[int, list[int]]:
    """Return the drawn steps, each with those that it reads, through numbers and hooks."""
    reach: dict[int, list[int]] = {}
    drawn: dict[int, list[int]] = {}
    for n, step in enumerate(steps):
        sources = list(dict.fromkeys(m for s in step.sources for m in reach[s]))
        if step.drawn:
            drawn[n] = sources
        reach[n] = [n] if step.drawn else sources
    return drawn


def _set_rows(boxes: list[Box]) -> None:
    """Set the row of each box; boxes are in the order of the computation."""
    for box in boxes:
        box.row = max((above.row + 1 for above in box.above), default=0)
    for box in reversed(boxes):  # inputs, and what comes of inputs alone, near their readers
        near = min((below.row - 1 for below in box.below), default=box.row)
        if not box.above or all(not a.above and len(a.below) == 1 for a in box.above):
            box.row = max(box.row, near)


def _with_points(a: Box, b: Box) -> list[Box]:
    """Return the way of an edge: its ends, and a point in each row between."""
    points = [Box([], "", "", "", False, "point", row) for row in range(a.row + 1, b.row)]
    way = [a, *points, b]
    if points:
        a.below[a.below.index(b)], b.above[b.above.index(a)] = points[0], points[-1]
        for before, point, after in zip(way, points, way[2:], strict=False):
            point.above, point.below = [before], [after]
    return way


def _order(rows: list[list[Box]]) -> None:
    """Order each row by the middle of its neighbours, again and again."""
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for row in rows if down else reversed(rows):
            at = {id(box): i for each in rows for i, box in enumerate(each)}

            def middle(box: Box, at: dict[int, int] = at, down: bool = down) -> float:
                near = box.above if down else box.below
                return _mean(at[id(n)] for n in near) if near else at[id(box)]

            row.sort(key=middle)


def _spread(rows: list[list[Box]]) -> None:
    """Give each box an x near the middle of its neighbours, without overlap."""
    for row in rows:
        x = 0.0
        for box in row:
            box.x = x + box.width / 2
            x += box.width + GAP
    for sweep in range(4 * _SWEEPS):
        down = sweep % 2 == 0
        for row in rows if down else reversed(rows):
            wanted = []
            for box in row:
                near = (
                    box.above + box.below
                    if sweep > 2 * _SWEEPS
                    else (box.above if down else box.below)
                )
                wanted.append(_mean(n.x for n in near) if near else box.x)
            _settle(row, wanted)


def _settle(row: list[Box], wanted: list[float]) -> None:
    """Move the boxes of a row to where they want to be, as far as their neighbours let them.

    Boxes that would overlap form a block, which goes to the mean of what its boxes want.
    """
    blocks: list[list[float]] = []  # the sum of wishes for the first box's x, their number, width
    for box, wish in zip(row, wanted, strict=True):
        blocks.append([wish - box.width / 2, 1, box.width + GAP])
        while len(blocks) > 1:
            (s, n, width), (t, m, more) = blocks[-2:]
            if s / n + width <= t / m:
                break
            blocks[-2:] = [[s + t - m * width, n + m, width + more]]
    left = iter(row)
    for total, number, _ in blocks:
        x = total / number
        for _ in range(int(number)):
            box = next(left)
            box.x = x + box.width / 2
            x += box.width + GAP


def _mean(numbers: Iterable[float]) -> float:
    found = [*numbers]
    return sum(found) / len(found)
