"""The examples in README.md and CONTRIBUTING.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import surgery
from tests.support.models import build

ROOT = Path(__file__).parent.parent


def block(file: str) -> str:
    """The first Python example of a document."""
    found = re.search(r"```python\n(.*?)```", (ROOT / file).read_text(), re.DOTALL)
    assert found is not None
    return found.group(1)


def test_the_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("gpt2").save_pretrained(tmp_path / "openai-community/gpt2")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block("README.md"), names)
    assert surgery.summary(names["model"]).inserted > 0
    assert list((tmp_path / "adapter").glob("surgery*"))


def test_the_plugin_in_contributing_is_the_one_that_is_tested() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    folder = ROOT / "plugins/examples/surgery-red"
    for file in ("pyproject.toml", "surgery_red.py", "test_red.py"):
        assert (folder / file).read_text().strip() in text
    assert len((folder / "surgery_red.py").read_text().splitlines()) <= 40
