"""The page of a grid in a browser, and the names in its drawings."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Annotation

from surgery_recipes.comparison import plots, tables
from surgery_recipes.comparison.finished_runs import read_runs
from surgery_recipes.comparison.grid import Grid, cells
from tests.recipes.comparison.grids import finished, grid

ROWS = ["prefix", "inducer", "lora", "adapter", "bitfit", "mam_adapter", "mam_inducer", "gating"]
SCORES = ["accuracy", *(f"a_long_score_{i}" for i in range(8))]
PROBE = """
<script>
const report = {errors};
const first = () => document.querySelector(".task0 tbody tr td").textContent;
report.start = first();
document.querySelectorAll(".task0 th")[1].click(); report.lowest = first();
document.querySelectorAll(".task0 th")[1].click(); report.highest = first();
document.querySelectorAll(".task0 th")[0].click(); report.named = first();
const shown = (all) => [...document.querySelectorAll(all)].filter((e) => e.offsetParent).length;
report.tabs = [shown(".task0 table"), shown(".task1 table")];
document.getElementById("t1").click();
report.other = [shown(".task0 table"), shown(".task1 table")];
document.getElementById("t0").click();
report.wide = document.documentElement.scrollWidth <= window.innerWidth;
report.cut = [...document.querySelectorAll(".scroll")].filter(
  (e) => e.scrollWidth > e.clientWidth + 1).length;
report.drawings = [...document.querySelectorAll(".task0 svg")].map((e) =>
  e.querySelectorAll("path").length > 20 && e.getBoundingClientRect().width > 400);
document.documentElement.dataset.report = JSON.stringify(report);
</script>
"""
ERRORS = "<script>const errors = []; onerror = (said) => { errors.push(said); };</script>"


def filled(folder: Path) -> Grid:
    made = grid(
        folder, tasks=["sst2", "mnli"], rows=ROWS, scores={"sst2": SCORES, "mnli": ["accuracy"]},
        about="What <it> is.", claims={
            "It <wins>": {"better": "inducer", "than": "prefix", "score": "sst2.accuracy"}
        },
    )  # fmt: skip
    for cell in cells(made):
        value = 0.5 + ROWS.index(cell.row) / 1000 + cell.seed / 10000
        finished(cell, value, scores=dict.fromkeys(SCORES, value))
    tables.write(made, cells(made))
    return made


def test_the_page_in_a_browser(tmp_path: Path) -> None:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(names)} on PATH")
    filled(tmp_path)
    text = (tmp_path / "table.html").read_text()
    assert not re.search(r"(src|href)=.?https?:|url\(https?:", text)
    assert "What &lt;it&gt; is." in text
    assert "It &lt;wins&gt;" in text
    probed = tmp_path / "probed.html"
    probed.write_text(text.replace("<style>", ERRORS + "<style>", 1) + PROBE)
    command = [
        found, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,1600",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", probed.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    said = re.search(r'data-report="([^"]*)"', done.stdout)
    assert said, done.stdout[:500]
    report: dict[str, Any] = json.loads(said[1].replace("&quot;", '"'))
    assert report == {
        "errors": [], "start": "prefix", "lowest": "prefix", "highest": "gating",
        "named": "adapter", "tabs": [1, 0], "other": [0, 1], "wide": True, "cut": 0,
        "drawings": [True, True],
    }  # fmt: skip


def test_names_in_a_drawing_do_not_overlap_and_stay_in_it(tmp_path: Path) -> None:
    made = filled(tmp_path)
    lines = read_runs(cells(made))
    for panel in (plots.by_parameters, plots.by_length):
        figure = plots._figure(panel, made, lines)
        figure.canvas.draw()
        for axes in figure.axes:
            named = [text for text in axes.texts if isinstance(text, Annotation)]
            assert [text.get_text() for text in named] == ROWS
            renderer = figure.canvas.get_renderer()
            boxes = [text.get_window_extent(renderer) for text in named]
            for i, box in enumerate(boxes):
                assert not any(box.overlaps(other) for other in boxes[i + 1 :])
            page = figure.bbox
            assert all(page.x0 <= box.x0 and box.x1 <= page.x1 for box in boxes)
            assert all(page.y0 <= box.y0 and box.y1 <= page.y1 for box in boxes)


def test_the_printed_table_fits_80_columns_unless_it_is_to_be_wide(tmp_path: Path) -> None:
    from rich.console import Console

    made = filled(tmp_path)
    for wide in (False, True):
        console = Console(width=80 if not wide else 400, record=True, quiet=False, file=None)
        with console.capture() as printed:
            console.print(tables.write(made, cells(made), wide))
        lines = printed.get().splitlines()
        assert len([line for line in lines if "inducer" in line]) == 2  # no row is folded
        assert ("--wide" in printed.get()) != wide
        assert ("peak MiB" in printed.get()) == wide
        assert "sst2 accuracy" in printed.get()
