"""The command line: what it lists."""

from __future__ import annotations

from typer.testing import CliRunner

import surgery
from surgery.cli import app


def test_methods_are_listed_with_their_defaults() -> None:
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["methods"]).output
    assert all(name in shown for name in surgery.methods())
    assert "ranks={}" in shown
    assert "MISSING" not in shown
