"""Draw docs/architecture.svg from the imports of surgery/, and fill the table of floors.

    python docs/draw_architecture.py

The floors are those of tests/test_house.py, the arrows come from the import statements, and the
sentences from the docstrings. An arrow from a to c is left out where a also imports b, and b
leads to c; the box of a then names c in its last line. The output has no date and no random part,
so tests/test_architecture.py can compare it with the committed files.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from html import escape
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "surgery"
SVG = ROOT / "docs/architecture.svg"
DOCUMENT = ROOT / "docs/architecture.md"
BEGIN, END = "<!-- floors: begin -->", "<!-- floors: end -->"

# Where a box stands on its floor, and the file to read first. A new package needs a line here.
LEFT, CENTRE, RIGHT = range(3)
PLACES = {
    "cli": (CENTRE, "cli/console.py"),
    "testing": (CENTRE, "testing/check.py"),
    "surgery": (CENTRE, "__init__.py"),
    "adapter": (LEFT, "adapter/saving.py"),
    "drawing": (RIGHT, "drawing/look.py"),
    "formats": (LEFT, "formats/translate.py"),
    "direct": (RIGHT, "direct/verbs.py"),
    "splicer": (CENTRE, "splicer/operations.py"),
    "host": (RIGHT, "host/execution.py"),
    "locator": (LEFT, "locator/search.py"),
    "rewrite": (RIGHT, "rewrite/apply.py"),
    "patterns": (LEFT, "patterns/find.py"),
    "capture": (LEFT, "capture/forward.py"),
    "plugin": (RIGHT, "plugin/site.py"),
    "interop": (LEFT, "interop/isolation.py"),
    "attention": (RIGHT, "attention/sdpa.py"),
    "errors": (CENTRE, "errors.py"),
}

WIDTH, MARGIN, LABEL, GUTTER, GAP = 920, 20, 40, 36, 64
BOX = (WIDTH - 2 * MARGIN - LABEL - GUTTER - GAP) // 2
PAD, LINE, SPACE, LANE = 14, 18, 44, 14  # LANE: between two arrows side by side

STYLE = """
  text { font: 13px -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif }
  .page { fill: #ffffff; stroke: #d1d9e0 }
  .floor { fill: #f6f8fa }
  .box { fill: #ffffff; stroke: #afb8c1 }
  .file { stroke-dasharray: 5 3 }
  .name { font-size: 15px; font-weight: 600; fill: #1f2328 }
  .said { fill: #1f2328 }
  .less { font-size: 12px; fill: #59636e }
  .arrow { fill: none; stroke: #0969da; stroke-width: 1.4 }
  .head { fill: #0969da }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117; stroke: #3d444d }
    .floor { fill: #151b23 }
    .box { fill: #212830; stroke: #656c76 }
    .name, .said { fill: #f0f6fc }
    .less { fill: #9198a1 }
    .arrow { stroke: #4493f8 } .head { fill: #4493f8 }
  }
"""

# -- what is drawn -----------------------------------------------------------------------------


@cache
def floors() -> list[list[str]]:
    """The names on each floor, the ground first; FLOORS of tests/test_house.py is the source."""
    for node in ast.parse((ROOT / "tests/test_house.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS":
            return [
                sorted(names, key=lambda n: PLACES[n]) for names in ast.literal_eval(node.value)
            ]
    raise SystemExit("tests/test_house.py has no FLOORS any more. Say here where the floors stand.")


def files(name: str) -> list[Path]:
    """The files of a package, or the one file at the top of surgery/."""
    if name == "surgery":
        return [LIBRARY / "__init__.py"]
    return sorted((LIBRARY / name).glob("*.py")) or [LIBRARY / f"{name}.py"]


def sentence(name: str) -> str:
    """The first sentence of a package's face, or of a file, without markup."""
    text = ast.get_docstring(ast.parse(files(name)[0].read_text())) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("``", "")


@cache
def imports(name: str) -> set[str]:
    """The other packages and top files that this one imports anywhere in its files."""
    found = set()
    for path in files(name):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module == "surgery":
                rooms = [alias.name for alias in node.names if alias.name in PLACES]
                found |= {f"surgery.{room}" for room in rooms} or {"surgery"}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module or "")
    ours = [m.split(".") for m in found if m.split(".")[0] == "surgery"]
    return {parts[1] if parts[1:] else "surgery" for parts in ours} - {name}


@cache
def reached(name: str) -> frozenset[str]:
    """Everything below that a package leads to."""
    return frozenset(imports(name).union(*map(reached, imports(name))))


def arrows(name: str) -> list[str]:
    """The imports that no other import leads to; these are drawn."""
    direct = imports(name)
    return sorted(n for n in direct if not any(n in reached(other) for other in direct))


def table() -> str:
    """The floors as Markdown, the highest first."""
    lines = ["| floor | package | what it does | start reading at |", "|---|---|---|---|"]
    for floor, names in reversed(list(enumerate(floors()))):
        for name in names:
            file = PLACES[name][1]
            link = f"[{file}](../surgery/{file})"
            lines.append(f"| {floor} | `{name}` | {sentence(name)} | {link} |")
    return "\n".join(lines)


def document(text: str) -> str:
    """A text with the table of floors between its two markers."""
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


# -- how it is drawn ---------------------------------------------------------------------------


def length(text: str, size: float) -> float:
    """The width of a text in pixels, in a font as wide as any that a reader may have."""
    classes = {"ijl.,:;' ": 0.33, "ftr-()": 0.42, "cszk": 0.57, "w": 0.82, "mMW": 0.98}
    ems = {c: width for these, width in classes.items() for c in these}
    return size * sum(ems.get(c, 0.7 if c.isupper() else 0.63) for c in text)


def wrapped(text: str, size: float) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if length(longer, size) > BOX - 2 * PAD:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


class Box:
    """A package, or a file at the top: where its box lies, and the lines in it."""

    def __init__(self, name: str, floor: int) -> None:
        self.name, self.floor, self.y = name, floor, 0.0  # y is known when all boxes are
        self.x = MARGIN + LABEL + PLACES[name][0] * (BOX + GAP) // 2
        self.is_package = len(files(name)) > 1
        count = f"{len(files(name))} files" if self.is_package else "one file"
        self.count = "the public face" if name == "surgery" else count
        self.said = wrapped(sentence(name), 13)
        more = sorted(imports(name) - set(arrows(name)))
        self.less = wrapped(f"also imports {', '.join(more)}", 12) if more else []
        self.height = 2 * PAD + 16 + LINE * (len(self.said) + len(self.less))

    def draw(self) -> list[str]:
        kind = "box" if self.is_package else "box file"
        x, y = self.x + PAD, self.y + PAD + 12
        out = [
            f'<rect class="{kind}" {_area(self.x, self.y, BOX, self.height)} rx="6"/>',
            _text("name", x, y, self.name),
            _text("less", self.x + BOX - PAD, y, self.count, ' text-anchor="end"'),
        ]
        for kind, lines in (("said", self.said), ("less", self.less)):
            for line in lines:
                y += LINE + (4 if line is self.said[0] else 0)
                out.append(_text(kind, x, y, line))
        return out


def _area(x: float, y: float, width: float, height: float) -> str:
    return f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'


def _text(kind: str, x: float, y: float, text: str, more: str = "") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}"{more}>{escape(text)}</text>'


class Picture:
    """The boxes on their floors, and the arrows between them."""

    def __init__(self) -> None:
        self.boxes = {n: Box(n, floor) for floor, names in enumerate(floors()) for n in names}
        self.edges = [(a, b) for a in self.boxes for b in arrows(a)]
        self.bands: dict[int, tuple[float, float]] = {}  # top and bottom of each floor's boxes
        y = MARGIN + 52.0
        for floor in reversed(range(len(floors()))):
            here = [self.boxes[n] for n in floors()[floor]]
            height = max(box.height for box in here)
            for box in here:
                box.y, box.height = y, height
            self.bands[floor] = (y, y + height)
            y += height + SPACE
        self.height = y - SPACE + MARGIN + 14
        self.lanes: dict[tuple[int, float], int] = defaultdict(int)

    def ends(self, name: str, down: bool) -> dict[str, float]:
        """The x at which each arrow leaves a box (``down``) or enters it, by its other end."""
        others = [b if down else a for a, b in self.edges if name == (a if down else b)]
        others.sort(key=lambda n: (PLACES[n][0], self.boxes[n].floor * (-1 if down else 1)))
        middle = self.boxes[name].x + BOX / 2
        step = min(70.0, (BOX - 80) / max(len(others), 1))
        return {n: middle + step * (i - (len(others) - 1) / 2) for i, n in enumerate(others)}

    def way(self, a: str, b: str) -> list[tuple[float, float]]:
        """The points of an arrow: out of a box, in and out of each floor between, into a box."""
        start, end = self.ends(a, down=True)[b], self.ends(b, down=False)[a]
        first, last = self.boxes[a].floor, self.boxes[b].floor
        passed = range(first - 1, last, -1)
        roads: list[list[float]] = [[start]]
        for floor in passed:
            roads = [[*road, x] for road in roads for x in self.free(floor, start, end)]
        road = min(roads, key=lambda r: (sum(abs(x - y) for x, y in pairwise([*r, end])), r))
        points = [(start, self.bands[first][1])]
        for floor, x in zip(passed, road[1:], strict=True):
            self.lanes[floor, x] += 1
            x += LANE * (self.lanes[floor, x] - 1)
            points += [(x, self.bands[floor][0]), (x, self.bands[floor][1])]
        return [*points, (end, self.bands[last][0])]

    def free(self, floor: int, *wanted: float) -> list[float]:
        """Where an arrow can pass a floor: beside, between, or where no box stands."""
        between = MARGIN + LABEL + BOX + (GAP - LANE) / 2
        asked = (between, WIDTH - MARGIN - GUTTER + 12, *wanted)
        lefts = [self.boxes[n].x for n in floors()[floor]]
        return [x for x in asked if not any(left - 8 < x < left + BOX + 8 for left in lefts)]

    def arrow(self, a: str, b: str) -> list[str]:
        points = self.way(a, b)
        path = f"M{points[0][0]:g}"
        for (x0, y0), (x1, y1) in zip(points[::2], points[1::2], strict=True):
            bend = (y1 - y0) * 0.55
            path += f" {y0:g} C{x0:g} {y0 + bend:g} {x1:g} {y1 - bend:g} {x1:g} {y1:g}"
            path += f" L{x1:g}" if (x1, y1) != points[-1] else ""
        x, y = points[-1]
        head = f'<path class="head" d="M{x:g} {y:g} l-4.5 -9 h9 z"/>'
        return [f'<path class="arrow" d="{path}"><title>{a} imports {b}</title></path>', head]

    def draw(self) -> str:
        out = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height:g}" '
            f'width="{WIDTH}" height="{self.height:g}" role="img">',
            "<title>The packages of surgery on their floors, and what each of them imports</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="page" {_area(0.5, 0.5, WIDTH - 1, self.height - 1)} rx="8"/>',
        ]
        for floor, (top, bottom) in sorted(self.bands.items(), reverse=True):
            band = _area(MARGIN / 2, top - 10, WIDTH - MARGIN, bottom - top + 20)
            out.append(f'<rect class="floor" {band} rx="8"/>')
            out.append(_text("less", MARGIN + 4, (top + bottom) / 2 + 4, str(floor)))
        out += self.legend()
        out += [line for edge in self.edges for line in self.arrow(*edge)]
        out += [line for box in self.boxes.values() for line in box.draw()]
        return "\n".join([*out, "</svg>"]) + "\n"

    def legend(self) -> list[str]:
        y, x = MARGIN + 16, MARGIN + LABEL
        said = "imports; what a longer way leads to as well stands under “also imports”"
        out = [
            _text("less", MARGIN - 4, y, "floor"),
            f'<path class="arrow" d="M{x} {y - 4} h30"/>',
            f'<path class="head" d="M{x + 36} {y - 4} l-9 -4.5 v9 z"/>',
            _text("less", x + 46, y, said),
        ]
        for at, kind, what in ((600, "box", "a package"), (730, "box file", "a single file")):
            out.append(f'<rect class="{kind}" {_area(at, y - 12, 26, 16)} rx="4"/>')
            out.append(_text("less", at + 34, y, what))
        return out


def main() -> None:
    """Write both files."""
    SVG.write_text(Picture().draw())
    DOCUMENT.write_text(document(DOCUMENT.read_text()))


if __name__ == "__main__":
    main()
