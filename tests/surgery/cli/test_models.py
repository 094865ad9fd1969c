"""``surgery locate`` writes pages and drawings; ``surgery diff`` shows what a method changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import surgery
from surgery.cli import app
from tests.support.models import build

SITE = "transformer.h.0.attn"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    build("gpt2").save_pretrained(folder)
    return str(folder)


def test_locate_writes_a_page_and_a_drawing(model: str, tmp_path: Path) -> None:
    page, drawing = tmp_path / "out.html", tmp_path / "out.svg"
    words = ["locate", model, "--html", str(page), "--svg", SITE, str(drawing)]
    done = CliRunner().invoke(app, [*words, "--method", "lora", "--method", "prefix"])
    assert done.exit_code == 0, done.output
    assert "lora_query" in page.read_text()
    assert "prefix_merged" in page.read_text()
    assert drawing.read_text().startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert f"wrote {page}" in done.output


def test_locate_refuses_before_it_loads(tmp_path: Path) -> None:
    for option in (["--html", "none/x.html"], ["--svg", SITE, "none/x.svg"], ["--method", "lorra"]):
        done = CliRunner().invoke(app, ["locate", str(tmp_path / "no model"), *option])
        assert done.exit_code == 1
        assert "cannot be loaded" not in done.output


def test_diff_prints_what_a_method_changes(model: str) -> None:
    done = CliRunner().invoke(app, ["diff", model, "lora", "rank=2", "--site", SITE])
    assert done.exit_code == 0, done.output
    assert done.stdout == surgery.diff(build("gpt2"), surgery.method("lora", rank=2), SITE)
    wrong = CliRunner().invoke(app, ["diff", model, "lora", "--site", "transformer.h.0.atn"])
    assert wrong.exit_code == 1
    assert "Did you mean 'transformer.h.0.attn'?" in wrong.output
