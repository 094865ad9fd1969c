"""Write what a run has recorded as Markdown, with a picture where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu.record import Cells, Record

HEAD = """# Measured on a GPU

Written by `make gpu`, on one machine in one run. Candidates take turns, times are medians, ratios
are medians over the rounds; memory is the rise of the allocated memory during one run. Models have
random weights. A row that says FAILED is a failure of this library; one that says "PEFT's error"
has none of ours beside it.
"""


def write(record: Record, folder: Path, name: str = "RESULTS_GPU") -> Path:
    """Write the report; return its path."""
    drawn = picture(record, folder / f"{name}.png")
    lines = [HEAD, *(f"- {what}: {value}" for what, value in record.head.items()), "\n## Bars\n"]
    lines += [f"- {bar}" for bar in record.bars.values()]
    lines += ["\n## Failures\n", *(f"- {said}" for said in record.failed)]
    lines += [] if record.failed else ["None."]
    lines += ["", f"![curves of the core]({name}.png)" if drawn else "No picture: matplotlib is "
              "not installed, or no curve was measured."]  # fmt: skip
    for title, rows in record.tables.items():
        lines += [f"\n### {title}\n", *table(rows)]
    path = folder / f"{name}.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def table(rows: dict[str, Cells]) -> list[str]:
    """Return the lines of a table; what a row says without a column stands in its last cell."""
    columns = list(dict.fromkeys(c for cells in rows.values() for c in cells if c))
    remarks = any("" in cells for cells in rows.values())
    heads = ["", *columns, *([""] * remarks)]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for name, cells in rows.items():
        row = [name, *(cells.get(column, "") for column in columns)]
        lines.append(f"| {' | '.join(row + [cells.get('', '')] * remarks)} |")
    return lines


def picture(record: Record, path: Path) -> bool:
    """Draw the curves; return whether there is a picture."""
    panels = {title: curves for title, curves in record.curves.items() if curves}
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    if not panels:
        return False
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 4), squeeze=False)
    for place, (title, curves) in zip(axes.flat, panels.items(), strict=True):
        for name, points in curves.items():
            place.loglog(*zip(*points, strict=True), marker="o", label=name)
        place.set(title=title, xlabel="n")
        place.set_xscale("log", base=2)
        place.grid(alpha=0.3)
        place.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
