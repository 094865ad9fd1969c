"""The house: rooms on floors, faces, short files, one door to transformers, honest documents."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "surgery"
# A package imports packages of lower floors only. The order is decided here and drawn in
# docs/architecture.md.
FLOORS = [
    {"errors"},
    {"interop", "attention"},
    {"capture", "plugin"},
    {"patterns"},
    {"locator", "rewrite"},
    {"host"},
    {"splicer"},
    {"formats", "direct"},
    {"adapter", "drawing"},
    {"surgery"},
    {"testing"},
    {"cli"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
PACKAGES = sorted(p.parent for p in LIBRARY.glob("*/__init__.py"))
FILES = sorted(LIBRARY.rglob("*.py"))
PLUGINS = sorted((ROOT / "plugins").glob("*.py"))
RECIPES = sorted((ROOT / "recipes").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def name_of(path: Path) -> str:
    """The dotted name of a module of the library, such as ``surgery.host.variant``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The package, or file at the top, that a module of the library belongs to."""
    return module.split(".")[1] if "." in module else module


MODULES = {name_of(path): path for path in FILES}
FACES = {name_of(package / "__init__.py") for package in PACKAGES}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Every import of a file, wherever in it: the module, and the name taken from it or ''."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports name their module in full"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner, "") if inner in MODULES else (node.module, alias.name)


@cache
def of_the_library(path: Path) -> list[tuple[str, str]]:
    return [(m, n) for m, n in imports(path) if m == "surgery" or m.startswith("surgery.")]


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT).with_suffix(""))


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_an_import_leads_down_or_stays_in_its_room(path: Path) -> None:
    here = room_of(name_of(path))
    for module, name in of_the_library(path):
        other = room_of(module)
        assert other == here or FLOOR[other] < FLOOR[here], f"{here} imports {module}.{name}"


@pytest.mark.parametrize("path", [*FILES, *PLUGINS, *RECIPES], ids=ids)
def test_another_package_is_entered_by_its_face(path: Path) -> None:
    inside = path.is_relative_to(LIBRARY)
    here = room_of(name_of(path)) if inside else ""
    for module, name in of_the_library(path):
        if inside and room_of(module) == here:
            continue
        package, _, last = module.rpartition(".")
        if inside and not name and package in MODULES:  # a module that a face offers
            module, name = package, last
        assert module.count(".") <= inside, f"{path.name} reaches behind a face: {module}.{name}"
        assert name in exported(parsed(MODULES[module])) or module not in FACES


@pytest.mark.parametrize("package", PACKAGES, ids=ids)
def test_files_of_a_package_import_each_other_in_no_circle(package: Path) -> None:
    inside = {name_of(path): path for path in package.glob("*.py") if path.stem != "__init__"}
    arrows = {n: {m for m, _ in imports(path) if m in inside} for n, path in inside.items()}
    face = name_of(package / "__init__.py")
    for name, path in inside.items():
        assert face not in {m for m, n in imports(path)}, f"{name} enters its own face"
    while arrows:
        ground = {n for n, to in arrows.items() if not to & arrows.keys()}
        assert ground, f"a circle among {sorted(arrows)}"
        arrows = {n: to for n, to in arrows.items() if n not in ground}


def face(package: Path) -> ast.Module:
    return parsed(package / "__init__.py")


def exported(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return []


@pytest.mark.parametrize("package", [LIBRARY, *PACKAGES], ids=ids)
def test_no_name_of_a_face_hides_a_module(package: Path) -> None:
    modules = {p.stem for p in package.glob("*.py")} | {p.name for p in package.iterdir()}
    offered = {name for _, name in imports(package / "__init__.py") if name}
    assert not offered & modules


@pytest.mark.parametrize("package", PACKAGES, ids=ids)
def test_a_face_is_one_sentence_imports_and_all(package: Path) -> None:
    tree = face(package)
    text = ast.get_docstring(tree) or ""
    assert text.endswith(".")
    assert not re.search(r"[.;] \w", text), "one sentence"
    kinds = [type(node) for node in tree.body[1:]]
    assert set(kinds[:-1]) <= {ast.ImportFrom}
    assert kinds[-1] is ast.Assign
    used = {
        (m, n)
        for path in [*FILES, *PLUGINS, *RECIPES]
        if path.parent != package
        for m, n in of_the_library(path)
    }
    here = name_of(package / "__init__.py")
    needed = {n for m, n in used if m == here} | {
        m.split(".")[-1] for m, n in used if not n and m.rpartition(".")[0] == here
    }
    if package.name == "cli":
        needed.add("app")  # the program, which pyproject.toml names
    if package.name == "testing":  # what the tests of plugins use
        needed |= {"LAWS", "MORE_SHAPES", "SHAPES", "Contract", "Law", "Shape"}
        needed |= {"batches", "check_method", "make_model", "models", "sites"}
    assert set(exported(tree)) == needed, "a face offers what other packages use, no more"


@pytest.mark.parametrize("path", [*FILES, *PLUGINS, *RECIPES], ids=ids)
def test_a_file_is_short_and_says_what_it_does(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    assert ast.get_docstring(ast.parse(text))
    assert path.stem not in ("utils", "helpers", "misc", "common")


@pytest.mark.parametrize("path", [*FILES, *PLUGINS, *RECIPES], ids=ids)
def test_no_docstring_is_a_question(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            first = (ast.get_docstring(node) or "").split("\n\n")[0]
            assert not first.endswith("?"), f"{getattr(node, 'name', path.stem)}: {first}"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_only_one_file_knows_transformers(path: Path) -> None:
    if ids(path) not in (
        "surgery/interop/huggingface",
        "surgery/cli/console",
        "surgery/testing/shapes",
    ):
        assert not [m for m, _ in imports(path) if m.split(".")[0] == "transformers"]


@pytest.mark.parametrize("path", PLUGINS, ids=ids)
def test_methods_import_only_the_public_surgery_and_torch(path: Path) -> None:
    allowed = {"__future__", "surgery", "torch", "math", "re"}
    allowed |= {"dataclasses", "typing", "collections", "contextlib", "inspect", "threading"}
    own = f"surgery_plugins.{path.stem.split('_')[0]}_"  # further files of a long method
    assert {m.split(".")[0] for m, _ in imports(path) if not m.startswith(own)} <= allowed


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_no_model_name_in_the_library(path: Path) -> None:
    names = r"\b(gpt2|gpt_neox|llama|roberta|bert|t5|bart|falcon|bloom|mistral|qwen|vit|gemma)\b"
    assert not re.search(names, path.read_text(), re.IGNORECASE)


def test_tests_mirror_the_tree() -> None:
    """Each package has a folder of tests with a file named after one of its own."""
    folders = {p.parent.name for p in TESTS if p.parent.parent == ROOT / "tests/surgery"}
    assert folders == {package.name for package in PACKAGES}
    for package in PACKAGES:
        tested = {p.stem for p in (ROOT / "tests/surgery" / package.name).glob("test_*.py")}
        assert tested & {f"test_{p.stem}" for p in package.glob("*.py")}, package.name
    at_the_top = {p.stem for p in (ROOT / "tests/surgery").glob("test_*.py")}
    assert at_the_top <= {f"test_{p.stem}" for p in LIBRARY.glob("*.py")}


@pytest.mark.parametrize("path", TESTS, ids=ids)
def test_a_file_of_tests_stands_in_a_folder_and_says_what_it_tests(path: Path) -> None:
    folder, *deeper = path.relative_to(ROOT / "tests").parts
    if path.stem == "__init__":
        return
    if deeper:
        assert folder in ("surgery", "plugins", "recipes", "whole", "zoo", "support")
    else:
        assert path.stem in (
            "conftest",
            "test_house",
            "test_docs",
            "test_private_api",
            "test_architecture",
        )
    if folder in ("surgery", "whole"):
        name = path.stem
        assert name == "conftest" or name.startswith("test_"), "helpers stand in tests/support/"
    assert ast.get_docstring(parsed(path))
    if folder != "recipes":
        others = [m for m, _ in imports(path) if m.split(".")[-1].startswith("test_")]
        assert others == [], "what several tests use stands in tests/support/"


def test_every_package_is_installed() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for package in PACKAGES:
        assert f'"{name_of(package / "__init__.py")}"' in text


def test_every_hook_stands_in_contributing_with_its_signature() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for node in ast.parse((LIBRARY / "plugin/hookspecs.py").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            assert ast.unparse(node).splitlines()[1].rstrip(":") in text
