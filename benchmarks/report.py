"""Run the benchmarks and write the results to RESULTS.md and RESULTS.png beside this file.

Run: python benchmarks/report.py              (all of them; about an hour on two cores)
     python benchmarks/report.py serving      (these alone; the others stand as they were measured)

A benchmark is one run: its candidates take turns. What it found is kept in measured/NAME.json, with
the commit; RESULTS.md shows all that are there.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import compiled
import inducer_core
import matplotlib as mpl
import methods
import operators
import overhead
import scaling
import serving
from timing import BARS, LINES, REPORT

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
MEASURED = HERE / "measured"
SCRIPTS: dict[str, tuple[Any, list[str]]] = {
    "operators": (operators, []),
    "overhead": (overhead, ["--repeats", "12"]),
    "inducer_core": (inducer_core, ["--repeats", "5"]),
    "methods": (methods, ["--repeats", "4"]),
    "scaling": (scaling, []),
    "serving": (serving, []),
    "compiled": (compiled, ["--processes", "3"]),
}
HEAD = """# Measured

Written by `make bench`. Each part is one run on one machine: candidates take turns, medians and
paired ratios, nothing is carried over from another run. The commit of a part stands below its
title. All of it is on the CPU; `make gpu` measures on a GPU.

![curves and bars of the tables below](RESULTS.png)
"""


def measure(name: str) -> None:
    """Run one benchmark, and keep what it found."""
    script, arguments = SCRIPTS[name]
    for found in (REPORT, LINES, BARS):
        found.clear()
    script.main(arguments)
    told = {"commit": commit(), "text": REPORT, "lines": LINES, "bars": BARS}
    MEASURED.mkdir(exist_ok=True)
    (MEASURED / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n")


def commit() -> str:
    """Return the commit that is checked out, and whether the library differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True).stdout

    changed = git("status", "--porcelain", "--", "../surgery", "../plugins")
    return git("rev-parse", "--short", "HEAD").strip() + (" with changes" if changed else "")


def write() -> None:
    """Write RESULTS.md from all that is kept, and RESULTS.png if every part with one is there.

    A part that is not kept stands as it is in RESULTS.md.
    """
    before = (HERE / "RESULTS.md").read_text() if (HERE / "RESULTS.md").exists() else ""
    parts = re.split(r"^(?=## )", before, flags=re.MULTILINE)[1:]
    text, lines, bars = HEAD, dict[str, Any](), dict[str, Any]()
    for name, (script, _) in SCRIPTS.items():
        title = f"## {(script.__doc__ or '').splitlines()[0]} (`{name}.py`)"
        if not (MEASURED / f"{name}.json").exists():
            text += "".join(f"\n{part.strip()}\n" for part in parts if f"(`{name}.py`)" in part)
            continue
        kept = json.loads((MEASURED / f"{name}.json").read_text())
        text += f"\n{title}\n\nCommit {kept['commit']}.  \n\n"
        text += "\n".join(kept["text"]).strip("\n") + "\n"
        lines |= kept["lines"]
        bars |= kept["bars"]
    (HERE / "RESULTS.md").write_text(text)
    if all((MEASURED / f"{name}.json").exists() for name in SCRIPTS):
        picture(HERE / "RESULTS.png", lines, bars)


def picture(path: Path, lines: dict[str, Any], bars: dict[str, Any]) -> None:
    """Draw the curves of the attention core and the bars of the methods on one page."""
    panels = max(1, len(lines) + len(bars))
    figure, axes = plt.subplots((panels + 1) // 2, 2, figsize=(13, 3.6 * ((panels + 1) // 2)))
    places = iter(axes.flat)
    for title, curves in lines.items():
        place = next(places)
        for name, points in curves.items():
            place.loglog(*zip(*points, strict=True), marker="o", label=name)
        place.set(title=title, xlabel="n")
        place.set_xticks([n for n, _ in next(iter(curves.values()))], minor=False)
        place.xaxis.set_major_formatter("{x:.0f}")
        place.xaxis.set_minor_formatter("")
        place.grid(alpha=0.3)
        place.legend()
    for title, values in bars.items():
        place = next(places)
        names = list(dict.fromkeys(name for group in values.values() for name in group))
        for number, name in enumerate(names):
            own = [(i + 0.25 * number, group[name]) for i, group in enumerate(values.values())
                   if name in group]  # fmt: skip
            place.barh(*zip(*own, strict=True), height=0.25, label=name)
        place.set_yticks(range(len(values)), list(values))
        place.axvline(1.0, color="black", linewidth=0.8)
        place.invert_yaxis()
        place.set_title(title.replace(": ", ":\n"), fontsize=9)
        place.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside the bars
    for place in places:
        place.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("names", nargs="*", choices=[*SCRIPTS, []], metavar="NAME")
    for name in options.parse_args().names or SCRIPTS:
        measure(name)
        write()


if __name__ == "__main__":
    main()
