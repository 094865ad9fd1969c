"""docs/private_api.md names every private name of another library that our code leans on."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers as tr
from torch import nn

import surgery
from surgery.interop import huggingface
from surgery.plugin import dropout
from surgery_recipes.run import build as recipes_build
from tests.support.models import build, inputs

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs/private_api.md"
PACKAGES = {"surgery": "surgery", "plugins": "surgery_plugins", "recipes": "surgery_recipes"}
FILES = {
    str(path.relative_to(ROOT)): path
    for folder in PACKAGES
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "examples" not in path.parts
}
OURS = ("surgery", "surgery_plugins", "surgery_recipes")
PYTHON = {"_fields"}  # of a named tuple: documented by Python, as are names between double scores
# Strings with an underscore in front that are no names of a library: our own attributes, which are
# set by these strings, and endings of names.
WORDS = {"_unspliced_forward", "_unseen", "_seen", "_b1", "_b2", "__i", "_Operators"}
LIBRARY = re.compile(r"(torch|transformers|accelerate|datasets|peft|pluggy|safetensors)(\.\w+)+")


@dataclass(frozen=True)
class Row:
    """One row of the table: a name, whole or from the object that has it, and who leans on it."""

    name: str
    files: tuple[str, ...]
    tests: tuple[str, ...]

    def covers(self, use: str) -> bool:
        """Is this the row of a name as the code has it, ``torch._C.f`` or ``._forward_hooks``?"""
        return self.name.endswith(use) if use.startswith(".") else self.name == use


@cache
def tables() -> tuple[list[Row], list[Row]]:
    """The rows of the private names, and of the public names that no documentation promises."""
    private, _, other = TABLE.read_text().partition("\n## Undocumented")
    return _rows(private), _rows(other)


def _rows(text: str) -> list[Row]:
    cells = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| `")]
    quoted = [[tuple(re.findall(r"`([^`]+)`", cell)) for cell in row] for row in cells]
    return [Row(name, files, tests) for names, files, _, tests in quoted for name in names]


@cache
def tree(file: str) -> ast.Module:
    return ast.parse(FILES[file].read_text())


def is_private(name: str) -> bool:
    python = name.startswith("__") and name.endswith("__")
    return name.startswith("_") and len(name) > 1 and not python and name not in PYTHON


def defined(node: ast.ClassDef) -> set[str]:
    """What a class defines, or sets on its objects."""
    found = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
    for inner in ast.walk(node):
        stored = isinstance(getattr(inner, "ctx", None), ast.Store)
        if stored and isinstance(inner, ast.Name):
            found.add(inner.id)
        elif stored and isinstance(inner, ast.Attribute) and ast.unparse(inner.value) == "self":
            found.add(inner.attr)
    return found


@cache
def own_attributes() -> set[str]:
    classes = (n for file in FILES for n in ast.walk(tree(file)) if isinstance(n, ast.ClassDef))
    return {name for node in classes for name in defined(node)}


def is_own(name: str) -> bool:
    return name in own_attributes() or name in WORDS or name.startswith("_surgery")


def third_party(module: str) -> bool:
    root = module.partition(".")[0]
    return root not in OURS and root not in sys.stdlib_module_names


def roots(file: str) -> dict[str, str]:
    """What the names that a file imports, or gives to a part of a library, stand for."""
    found = {}
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.partition(".")[0]
                found[alias.asname or whole] = whole
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in tree(file).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute):
            chain = ast.unparse(node.value).split(".")
            if chain[0] in found:
                found[ast.unparse(node.targets[0])] = ".".join([found[chain[0]], *chain[1:]])
    return found


def uses(file: str) -> Iterator[str]:
    """The private names of other libraries in a file: whole, or ``.name`` of some object."""
    known, inner, texts = roots(file), set(), set()
    for node in ast.walk(tree(file)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            texts |= {id(n.value) for n in node.body[:1] if isinstance(n, ast.Expr)}
        if isinstance(node, ast.JoinedStr):
            texts |= {id(part) for part in node.values}
        if isinstance(node, ast.ImportFrom) and node.module and third_party(node.module):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if any(map(is_private, whole.split("."))):
                    yield whole
        elif isinstance(node, ast.Attribute) and id(node) not in inner:
            inner |= {id(n) for n in ast.walk(node.value) if isinstance(n, ast.Attribute)}
            yield from _attribute(node, known)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            if id(node) in texts:
                continue
            if LIBRARY.fullmatch(text):
                yield text
            elif re.fullmatch(r"_\w+", text) and is_private(text) and not is_own(text):
                yield f".{text}"


def _attribute(node: ast.Attribute, known: dict[str, str]) -> Iterator[str]:
    chain: list[str] = []
    value: ast.expr = node
    while isinstance(value, ast.Attribute):
        chain.insert(0, value.attr)
        value = value.value
    root = known.get(value.id, "") if isinstance(value, ast.Name) else ""
    if root and third_party(root):
        private = [i for i, part in enumerate(chain) if is_private(part)]
        if private:
            end = private[-1] + (2 if chain[private[-1]] == "_C" else 1)
            yield ".".join([root, *chain[:end]])
    elif not root.startswith(("sys", *OURS)):
        yield from (f".{part}" for part in chain if is_private(part) and not is_own(part))


def overridden(file: str) -> Iterator[str]:
    """Private names of a library's class that a class of ours, derived from it, has as well."""
    folder, _, rest = file.partition("/")
    name = f"{PACKAGES[folder]}/{rest}".removesuffix(".py").removesuffix("/__init__")
    module = importlib.import_module(name.replace("/", "."))
    for node in tree(file).body:
        if isinstance(node, ast.ClassDef):
            ours = getattr(module, node.name)
            theirs = [base for base in ours.__mro__ if third_party(base.__module__)]
            have: set[str] = {n for base in theirs for n in vars(base)}
            if issubclass(ours, nn.Module):
                have |= set(vars(nn.Module()))
            yield from (f".{n}" for n in defined(node) if is_private(n) and n in have)


def found_in(file: str) -> set[str]:
    return {*uses(file), *overridden(file)}


@pytest.mark.parametrize("file", FILES)
def test_each_private_name_of_a_library_is_in_the_table(file: str) -> None:
    rows = [row for row in tables()[0] if file in row.files]
    missing = sorted(use for use in found_in(file) if not any(row.covers(use) for row in rows))
    assert not missing, (
        f"{file} leans on {', '.join(missing)}, private in the library that it is from. Add a row "
        "to docs/private_api.md (name, file, what breaks without it, which test notices), add the "
        "file to the row that is there, or do without."
    )


@pytest.mark.parametrize("row", tables()[0], ids=lambda row: row.name)
def test_each_row_of_the_table_is_of_a_name_in_use(row: Row) -> None:
    assert row.files
    for file in row.files:
        assert file in FILES, f"docs/private_api.md, {row.name}: no file {file}"
        assert any(map(row.covers, found_in(file))), (
            f"docs/private_api.md, {row.name}: {file} does not use it any more. Take it out."
        )


@pytest.mark.parametrize("row", tables()[1], ids=lambda row: row.name)
def test_each_undocumented_name_of_the_table_is_in_use(row: Row) -> None:
    last = row.name.rpartition(".")[2]
    for file in row.files:
        assert file in FILES, f"docs/private_api.md, {row.name}: no file {file}"
        assert re.search(rf"\b{last}\b", FILES[file].read_text()), (
            f"docs/private_api.md, {row.name}: {file} does not use it any more. Take it out."
        )


def test_each_test_that_the_table_names_is_there() -> None:
    files = (ROOT / "tests").rglob("test_*.py")
    there = {name for path in files for name in re.findall(r"def (test_\w+)", path.read_text())}
    for row in [row for rows in tables() for row in rows]:
        assert row.tests, f"docs/private_api.md, {row.name}: which test notices?"
        gone = sorted(set(row.tests) - there)
        assert not gone, f"docs/private_api.md, {row.name}: no test is called {', '.join(gone)}"


def test_the_hooks_by_which_transformers_collects_outputs_are_known() -> None:
    model = build("llama")
    model(**inputs("llama"), output_attentions=True, output_hidden_states=True)
    hooks = [hook for m in model.modules() for hook in m._forward_hooks.values()]
    assert hooks
    assert all(map(huggingface.is_own_hook, hooks))


def test_what_a_model_was_loaded_from_is_saved_with_its_adapter(tmp_path: Path) -> None:
    build("gpt2").save_pretrained(tmp_path / "base")
    model = tr.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    surgery.splice(model, surgery.method("lora", rank=2))
    folder = surgery.save(model, tmp_path / "adapter")
    assert any(str(tmp_path / "base") in path.read_text() for path in folder.glob("*.json"))


def test_a_new_head_is_told_from_what_was_loaded(tmp_path: Path) -> None:
    build("gpt2").save_pretrained(tmp_path)
    model = tr.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert huggingface.fresh_parameters(model) == ["score.weight"]
    assert recipes_build.fresh_parameters(model) == ["score.weight"]
    recipes_build.grow_vocabulary(model, 70)
    assert recipes_build.fresh_parameters(model) == ["score.weight"]


def test_packed_numbers_in_a_loaded_model_are_no_new_head(tmp_path: Path) -> None:
    build("gpt2").save_pretrained(tmp_path)
    model = tr.AutoModelForCausalLM.from_pretrained(tmp_path)
    packed = torch.zeros(4, 4, dtype=torch.uint8)
    model.transformer.h[0].attn.packed = nn.Parameter(packed, requires_grad=False)
    surgery.splice(model, surgery.method("lora", rank=2))
    assert surgery.freeze_base(model).fresh == ()


def test_the_choice_of_attention_function_is_an_attribute_of_the_config() -> None:
    model = build("gpt2")
    [(config, name)] = huggingface.choices(model)
    model.set_attn_implementation("sdpa")
    assert vars(config)[name] == "sdpa"
    model.set_attn_implementation("eager")
    assert vars(config)[name] == "eager"


@pytest.mark.gpu
def test_the_state_of_a_gpus_random_numbers_is_its_seed_and_its_position() -> None:
    seen = []
    for _ in range(2):
        torch.cuda.manual_seed(0)
        for _ in range(2):
            seen.append(dropout._fingerprint(torch.device("cuda")))
            torch.rand(3, device="cuda")
    assert seen[:2] == seen[2:]
    assert seen[0] != seen[1]
