"""``surgery new`` writes a package that installs and passes; ``surgery check`` checks a method."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import surgery
from surgery.cli import app
from surgery.cli.scaffold import Kind, write_package
from surgery.plugin.registry import registry
from surgery.testing import check_method

KINDS = [kind.value for kind in Kind]


def run(*words: str) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(words))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.few(2)
def test_each_start_keeps_the_contract_as_it_stands(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"new_{kind}"
    monkeypatch.chdir(tmp_path)
    done = run("new", name, "--like", kind)
    assert done.exit_code == 0, done.output
    folder = tmp_path / f"surgery-new-{kind}"
    texts = {p: p.read_text() for p in folder.rglob("*") if p.is_file()}
    assert {p.name for p in texts} == {
        "pyproject.toml", "README.md", "check.yml", f"surgery_{name}.py", f"test_{name}.py",
    }  # fmt: skip
    assert not [p for p, text in texts.items() if "METHOD" in text or "CLASS" in text]
    limit = {"edit": 40, "ffn": 50, "lora": 62, "prefix": 74}[kind]
    assert len(texts[folder / f"surgery_{name}.py"].splitlines()) <= limit
    monkeypatch.syspath_prepend(folder)
    offered = registry()._offered["method"]
    module = __import__(f"surgery_{name}")
    made: list[Any] = []
    module.register_methods(register=made.append)
    monkeypatch.setitem(offered, name, (made[0], "tests"))
    contract = check_method(surgery.method(name), shapes=("grouped",))
    assert not contract.refused
    assert not contract.exempt


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("My-Method", "'My-Method' cannot be the name of a method. Use small letters, digits"),
        ("lora", "there is a method 'lora' already. Choose another name."),
        ("taken", "surgery-taken is there already, and not an empty folder. Name another one."),
    ],
)
def test_a_name_that_cannot_be_used_is_told_and_nothing_is_written(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "surgery-taken").mkdir()
    (tmp_path / "surgery-taken/file").touch()
    done = run("new", name)
    assert done.exit_code == 1
    assert f"error: {message}" in done.output
    assert [p.name for p in tmp_path.rglob("*")] == ["surgery-taken", "file"]


def test_check_tells_a_wrong_option_and_a_wrong_law() -> None:
    done = run("check", "lora", "rank=2.5")
    assert done.exit_code == 1
    assert (
        "error: method 'lora': rank=2.5 is not possible. It must be a whole number" in done.output
    )
    done = run("check", "lora", "rank=2", "--exempt", "cache=why")
    assert "no law 'cache'. Did you mean 'cached'?" in done.output


@pytest.mark.slow
def test_from_a_clone_to_a_method_that_passes_in_ten_minutes_and_40_lines(tmp_path: Path) -> None:
    begin, path = time.monotonic(), tmp_path / "installed"
    environment = {**os.environ, "PYTHONPATH": str(path), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def done(*command: str) -> str:
        ended = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    folder = write_package("mine", Kind.edit, tmp_path / "surgery-mine")
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation")
    done(*install, "--target", str(path), str(folder))
    main = "from surgery.cli import app; app()"
    assert "mine" in done("-c", main, "methods")
    assert done("-c", main, "check", "mine").startswith("fused: 12 laws hold\n")
    quiet = ("-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")
    shown = done("-m", "pytest", *quiet, "--surgery-method=mine", "-rP", "surgery-mine")
    assert "2 passed" in shown
    assert "fused: 12 laws hold" in shown
    assert len((folder / "surgery_mine.py").read_text().splitlines()) <= 40
    assert time.monotonic() - begin < 600


def test_pytest_checks_a_method_that_is_named_and_tells_what_is_wrong(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    ended = subprocess.run(
        [*command, "--surgery-method=lroa", str(tmp_path)], cwd=tmp_path, capture_output=True,
        text=True,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "MethodError: no method 'lroa'. Did you mean 'lora'?" in ended.stdout


@pytest.mark.parametrize(
    ("name", "like"),
    [("_", "lora"), ("_2x", "prefix"), ("edit", "edit"), ("bottleneck", "ffn"), ("tensor", "edit")],
)
def test_a_name_whose_class_would_hide_another_is_refused(
    name: str, like: str, tmp_path: Path
) -> None:
    with pytest.raises(surgery.MethodError, match="which the file cannot have"):
        write_package(name, Kind(like), tmp_path / "made")
    assert not (tmp_path / "made").exists()
