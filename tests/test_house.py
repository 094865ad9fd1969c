"""The house: short files, imports that point down, one door to transformers, honest docs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    0: "causal dropout errors fastpath fingerprint frozen guards huggingface kernels patching "
    "proxy rebind unfused values",
    1: "adapter_files compiled extend insertable masks quiet rows signature task trial",
    2: "border edit fused recipe sites",
    3: "core dataflow method selection tracer",
    4: "assign hookspecs kept_whole projection recorder report virtual",
    5: "capture layout merged observe pattern registry train",
    6: "attention_ports call_sites ffn_pattern lse module_sites",
    7: "attention_pattern variant",
    8: "patterns",
    9: "apply locate",
    10: "host",
    11: "verify",
    12: "operate together",
    13: "splice",
    14: "merge store",
    15: "__init__",
    16: "cli testing",
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names.split()}
LIBRARY = sorted((ROOT / "surgery").glob("*.py"))
METHODS = sorted((ROOT / "plugins").glob("*.py"))


def imported(path: Path) -> list[str]:
    """Every module that a file imports, wherever in it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module]
            if node.module == "surgery":
                found += [f"surgery.{a.name}" for a in node.names]
    return found


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.stem)
def test_imports_point_down(path: Path) -> None:
    floor = FLOOR[path.stem]
    for name in imported(path):
        if name.startswith("surgery."):
            other = name.split(".")[1]
            if other in FLOOR:
                assert FLOOR[other] < floor, f"{path.stem} (floor {floor}) imports {other}"


@pytest.mark.parametrize("path", [*LIBRARY, *METHODS], ids=lambda p: p.stem)
def test_files_are_short_and_say_what_they_do(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    assert ast.get_docstring(ast.parse(text)) or path.stem == "__init__"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.stem)
def test_only_one_file_knows_transformers(path: Path) -> None:
    if path.stem not in ("huggingface", "cli", "testing"):
        assert not [n for n in imported(path) if n.split(".")[0] == "transformers"]


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_methods_import_only_the_public_surgery_and_torch(path: Path) -> None:
    allowed = {"__future__", "surgery", "torch", "math", "re"}
    allowed |= {"dataclasses", "typing", "collections", "contextlib"}
    assert {n.split(".")[0] for n in imported(path)} <= allowed
    assert not [n for n in imported(path) if n.startswith("surgery.")]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.stem)
def test_no_model_name_in_the_library(path: Path) -> None:
    names = r"\b(gpt2|gpt_neox|llama|roberta|bert|t5|bart|falcon|bloom|mistral|qwen|vit|gemma)\b"
    assert not re.search(names, path.read_text(), re.IGNORECASE)


def test_every_hook_stands_in_contributing_with_its_signature() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for node in ast.parse((ROOT / "surgery/hookspecs.py").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            assert ast.unparse(node).splitlines()[1].rstrip(":") in text


def test_the_readme_names_every_public_function() -> None:
    import surgery

    text = (ROOT / "README.md").read_text()
    functions = [n for n in surgery.__all__ if n[0].islower()]
    missing = [n for n in functions if f"{n}" not in text]
    assert missing == []
