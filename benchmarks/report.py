"""Run every benchmark and write the results to RESULTS.md and RESULTS.png beside this file.

Run: python benchmarks/report.py        (about an hour on two cores)
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import compiled
import inducer_core
import matplotlib as mpl
import methods
import overhead
import scaling
import torch
from timing import BARS, LINES, REPORT

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
HEAD = """# Measured

Written by `make bench`, on one machine in one run: candidates take turns, medians and paired
ratios, nothing is carried over from another run. {gpu}
"""


def picture(path: Path) -> None:
    """Draw the curves of the attention core and the bars of the methods on one page."""
    panels = len(LINES) + len(BARS)
    figure, axes = plt.subplots((panels + 1) // 2, 2, figsize=(13, 3.6 * ((panels + 1) // 2)))
    places = iter(axes.flat)
    for title, curves in LINES.items():
        place = next(places)
        for name, points in curves.items():
            place.loglog(*zip(*points, strict=True), marker="o", label=name)
        place.set(title=title, xlabel="n")
        place.set_xticks([n for n, _ in next(iter(curves.values()))], minor=False)
        place.xaxis.set_major_formatter("{x:.0f}")
        place.xaxis.set_minor_formatter("")
        place.grid(alpha=0.3)
        place.legend()
    for title, values in BARS.items():
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
    scripts: list[tuple[Any, list[str]]] = [
        (overhead, ["--repeats", "12"]),
        (inducer_core, ["--repeats", "5"]),
        (methods, ["--repeats", "4"]),
        (scaling, []),
        (compiled, ["--processes", "3"]),
    ]
    for script, arguments in scripts:
        name = Path(script.__file__).name
        REPORT.append(f"\n## {(script.__doc__ or '').splitlines()[0]} (`{name}`)\n")
        script.main(arguments)
    gpu = "" if torch.cuda.is_available() else "No GPU was at hand; `make gpu` measures on one."
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True
    ).stdout.strip()
    head = HEAD.format(gpu=gpu) + (f"\nCommit {commit}.\n" if commit else "")
    body = "\n".join(REPORT)
    text = f"{head}\n![curves and bars of the tables below](RESULTS.png)\n{body}\n"
    (HERE / "RESULTS.md").write_text(text)
    picture(HERE / "RESULTS.png")


if __name__ == "__main__":
    main()
