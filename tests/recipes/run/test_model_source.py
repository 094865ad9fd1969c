"""A model that a package should carry is found, or the package is named; code runs if trusted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from surgery.cli import app
from surgery.cli import runs as commands
from surgery.errors import RecipeError
from surgery_recipes.recipe_files import make_recipe
from surgery_recipes.run.model_source import PREFIX, SHIPPED, model_path, what_is_imported
from surgery_recipes.run.prepare import prepare_run

ROOT = Path(__file__).parents[3]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed package that leaves a file where its code has run."""
    (tmp_path / "carrier").mkdir()
    (tmp_path / "carrier/__init__.py").write_text(
        "from pathlib import Path\n"
        "Path(__file__).with_name('ran').touch()\n"
        "def get_model_path():\n"
        "    return Path(__file__).parent / 'model'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "carrier", raising=False)
    return "package:carrier"


def ran(folder: Path) -> bool:
    return (folder / "carrier/ran").exists()


def test_a_package_is_imported_only_if_it_is_trusted(package: str, tmp_path: Path) -> None:
    said = rf"imports the Python package carrier from {tmp_path}.*your rights.*--trust"
    with pytest.raises(RecipeError, match=said):
        model_path(package)
    recipe = make_recipe({"model": package, "task": "sst2"})
    with pytest.raises(RecipeError, match=said):
        prepare_run(recipe)
    assert not ran(tmp_path)
    assert model_path(package, trust=True) == str(tmp_path / "carrier/model")
    assert ran(tmp_path)


def test_folders_and_hub_ids_and_what_shipped_recipes_name_import_nothing_of_a_stranger() -> None:
    named = {
        word.strip("\"'").removeprefix("model=").removeprefix(PREFIX)
        for path in (ROOT / "recipes").rglob("*.yaml")
        for line in path.read_text().splitlines()
        if "model" in line
        for word in line.split()
        if PREFIX in word
    }
    assert named == SHIPPED
    for name in ("openai-community/gpt2", "./folder"):
        assert what_is_imported(name) == ""
        assert model_path(name) == name


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("json", r"'package:json'.*no get_model_path"),
        ("not_there", "the package not_there is not installed"),
        ("not_there.below", "the package not_there.below is not installed"),
        ("", "write package:NAME"),
        (".json", "write package:NAME"),
        ("a b", "write package:NAME"),
        ("os; print()", "write package:NAME"),
        ("json.nothing", "the package fails: "),
        ("__main__", "is not installed|no get_model_path"),
        ("x" * 10_000, "is not installed"),
    ],
)
def test_a_package_without_a_model_is_named(name: str, part: str) -> None:
    with pytest.raises(RecipeError, match=part) as told:
        model_path(f"package:{name}", trust=True)
    assert len(str(told.value)) < 600


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "1 / 0", "def get_model_path(): 1 / 0"])
def test_a_package_that_fails_is_an_error(
    code: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "carrier/__init__.py").write_text(code)
    with pytest.raises(RecipeError, match="the package fails"):
        model_path(package, trust=True)


@pytest.mark.parametrize(
    ("typed", "flags", "there", "runs"),
    [
        ("y\n", [], True, True),
        ("n\n", [], True, False),
        ("", [], True, False),
        ("y\n", [], False, False),
        ("", ["--trust"], False, True),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval", "compare"])
def test_the_command_line_asks_before_code_is_imported(
    command: str, typed: str, flags: list[str], there: bool, runs: bool, package: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """``there``: somebody sits at a terminal. The model is a folder without files."""
    monkeypatch.setattr(commands, "_somebody_is_there", lambda: there)
    (tmp_path / "recipe.yaml").write_text(f"model: {package}\ntask: sst2\n")
    (tmp_path / "grid.yaml").write_text(
        "title: t\ntasks: [sst2]\nrows: [lora]\nscores: {sst2: [accuracy]}\n"
        f"output: {tmp_path}/out\nset: ['model={package}']\n"
    )
    given = {"train": "recipe.yaml", "eval": ".", "compare": "grid.yaml"}[command]
    done = CliRunner().invoke(app, [command, str(tmp_path / given), *flags], input=typed)
    assert done.exit_code == 1
    assert ran(tmp_path) == runs
    shown = " ".join(done.output.split())
    if not there and not runs:
        assert "imports the Python package carrier" in shown
        assert "with --trust" in shown
    assert ("Import it?" in shown) == there
