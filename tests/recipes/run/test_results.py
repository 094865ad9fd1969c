"""Results are written as files that can be read safely."""

from __future__ import annotations

import json
from pathlib import Path

import surgery
from surgery_recipes.run import results


def test_samples_are_escaped(root: Path, tmp_path: Path) -> None:
    task = surgery.task("coqa")
    example = {"story": "<b>x", "turns": [], "question": "a & b?", "references": ["<i>"]}
    results.write_answers(tmp_path, task, {"dev": ([example], ["<script>"])})
    page = (tmp_path / "samples.html").read_text()
    assert "&lt;script&gt;" in page
    assert "a &amp; b?" in page
    assert "<script>" not in page
    assert json.loads((tmp_path / "answers.jsonl").read_text())["answer"] == "<script>"


def test_classes_are_marked_right_or_wrong(tmp_path: Path) -> None:
    task = surgery.task("sst2", path="")
    examples = [{"label": 0, "texts": ["dull"]}, {"label": 1, "texts": ["fine"]}]
    results.write_answers(tmp_path, task, {"dev": (examples, [0, 0])})
    page = (tmp_path / "samples.html").read_text()
    assert (page.count("✓ right"), page.count("✗ wrong")) == (1, 1)
    assert page.index("✓ right") < page.index("fine") < page.index("✗ wrong")
