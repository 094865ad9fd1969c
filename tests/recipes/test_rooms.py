"""The rooms of the recipes: imports point one way, through faces; files say what they do."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import surgery

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
# A room imports rooms of lower floors only.
FLOORS = [{"recipe_files", "metrics"}, {"tasks"}, {"run"}, {"comparison", "diagnosis"}, {"tools"}]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ROOMS = sorted(path.parent for path in RECIPES.glob("*/__init__.py"))
FILES = sorted(path for room in ROOMS for path in room.rglob("*.py"))
OPEN = {"tasks"}  # its face is for other packages


def ids(path: Path) -> str:
    return str(path.relative_to(RECIPES).with_suffix(""))


def imports(path: Path, package: str) -> Iterator[tuple[str, str]]:
    """Every import from a package, wherever in a file: the module, and the name taken from it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports name their module in full"
            found = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        yield from ((m, n) for m, n in found if m.split(".")[0] == package)


def exported(face: Path) -> list[str]:
    for node in ast.parse(face.read_text()).body:
        target = node.target if isinstance(node, ast.AnnAssign) else None
        target = node.targets[0] if isinstance(node, ast.Assign) else target
        if target is not None and ast.unparse(target) == "__all__":
            names: list[str] = ast.literal_eval(node.value)  # type: ignore[attr-defined]
            return names
    raise AssertionError(f"{face}: no __all__")


def test_every_room_has_a_floor_and_is_installed() -> None:
    assert {room.name for room in ROOMS} == set(FLOOR)
    text = (ROOT / "pyproject.toml").read_text()
    assert [room.name for room in ROOMS if f'"surgery_recipes.{room.name}"' not in text] == []
    loose = {path.name for path in RECIPES.glob("*.py")}
    assert loose == {"__init__.py"}, "every file has a room"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_an_import_leads_to_the_face_of_a_lower_room_or_stays(path: Path) -> None:
    here = path.relative_to(RECIPES).parts[0]
    for module, name in imports(path, "surgery_recipes"):
        room = module.split(".")[1]
        if room == here:
            continue
        assert FLOOR[room] < FLOOR[here], f"{here} imports {module}"
        assert module == f"surgery_recipes.{room}", f"{ids(path)} reaches behind a face: {module}"
        assert name in exported(RECIPES / room / "__init__.py")


@pytest.mark.parametrize("room", ROOMS, ids=ids)
def test_files_of_a_room_import_each_other_in_no_circle(room: Path) -> None:
    package = f"surgery_recipes.{room.name}"
    files = {path.stem: path for path in room.glob("*.py") if path.stem != "__init__"}
    arrows: dict[str, set[str]] = {}
    for stem, path in files.items():
        arrows[stem] = set()
        for module, name in imports(path, "surgery_recipes"):
            if module == package:
                assert name in files, f"{stem} enters its own face"
                arrows[stem].add(name)
            elif module.startswith(f"{package}."):
                arrows[stem].add(module.rpartition(".")[2])
    while arrows:
        ground = {stem for stem, to in arrows.items() if not to & arrows.keys()}
        assert ground, f"a circle among {sorted(arrows)}"
        arrows = {stem: to for stem, to in arrows.items() if stem not in ground}


@pytest.mark.parametrize("room", ROOMS, ids=ids)
def test_a_face_says_what_the_room_does_and_offers_what_others_use(room: Path) -> None:
    face = room / "__init__.py"
    tree = ast.parse(face.read_text())
    first = (ast.get_docstring(tree) or "").split("\n\n")[0]
    assert first.endswith(".")
    assert not re.search(r"[.;] \w", first), "one sentence"
    assert {type(node) for node in tree.body[1:]} <= {ast.ImportFrom, ast.Assign, ast.AnnAssign}
    modules = {path.stem for path in room.glob("*.py")}
    taken = {name for module, name in imports(face, "surgery_recipes")}
    own = {name for module, name in imports(face, "surgery_recipes") if module.count(".") == 2}
    assert not own & modules, "no name hides a module"
    assert taken == set(exported(face))
    users = [*FILES, *(ROOT / "surgery/cli").glob("*.py"), *(ROOT / "tests/recipes").rglob("*.py")]
    used = {
        name
        for path in users
        if path.parent != room
        for module, name in imports(path, "surgery_recipes")
        if module == f"surgery_recipes.{room.name}"
    }
    if room.name not in OPEN:
        assert set(exported(face)) <= used, "a face offers no more than others use"


@pytest.mark.parametrize("path", [RECIPES / "__init__.py", *FILES], ids=ids)
def test_a_file_is_short_and_says_what_it_does(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    doc = ast.get_docstring(ast.parse(text)) or ""
    assert doc
    assert not doc.split("\n")[0].endswith("?")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            said = ast.get_docstring(node) or ""
            assert not said.split("\n")[0].endswith("?"), f"{node.name}: a docstring is no question"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_recipes_use_public_names_of_surgery_alone(path: Path) -> None:
    for module, name in imports(path, "surgery"):
        assert module == "surgery"
        assert not name or name in surgery.__all__, f"{ids(path)}: surgery.{name}"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "surgery":
            assert node.attr in surgery.__all__, f"{ids(path)}: surgery.{node.attr}"


def test_a_strangers_tasks_use_public_names_alone() -> None:
    path = Path(__file__).parent / "tasks/strangers_tasks.py"
    for module, name in imports(path, "surgery"):
        assert module == "surgery"
        assert not name or name in surgery.__all__
    for module, name in imports(path, "surgery_recipes"):
        assert module == "surgery_recipes.tasks"
        assert name in exported(RECIPES / "tasks/__init__.py")


def test_tests_of_recipes_stand_in_the_same_rooms() -> None:
    folders = {path.parent.name for path in Path(__file__).parent.glob("*/test_*.py")}
    assert folders == set(FLOOR)
