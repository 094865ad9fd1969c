"""Each public name has an example in its docstring, and the example runs.

Examples with ``>>>`` are doctests. The code of others stands between pairs of backticks and runs in
order, with words between. Both see what ``names_for`` gives: a small model with the splices
``first`` and ``second``, its sites, inputs, an adapter in the folder ``adapter`` and so on.
"""

from __future__ import annotations

import copy
import doctest
import inspect
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import surgery
from surgery.plugin.registry import registry
from surgery.testing import make_model

# Types of signatures and pluggy's marker: they have no docstring of their own.
FORMS = {"Example", "Features", "Register", "RegisterTask", "Start", "TaskKind", "hookimpl"}
NAMES = [name for name in surgery.__all__ if name not in FORMS]
OTHER_LIBRARIES = {  # what the example needs, and the test that runs such a call
    "fit": "a method with a fit: tests/surgery/adapter/test_life_cycle.py",
    "from_peft": "PEFT: tests/surgery/formats/test_peft_model.py",
    "load_loralib": "a file of loralib: tests/surgery/formats/test_loralib.py",
    "parameter_groups": "a dataset for Trainer: tests/surgery/adapter/test_optimizer_groups.py",
    "push": "the hub: tests/surgery/adapter/test_pushing.py",
    "view": "TRL: tests/whole/test_preference_training.py",
}
SPLICES = {  # those of the example's model, where they are not first and second
    "combine": ("math", "code"),
    "copy": ("policy",),
    "hotswap": ("customer",),
    "use": ("style", "domain"),
}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def example_of(name: str) -> str:
    """The section ``Example:`` of a docstring, or of a method's where its class has none."""
    text = inspect.getdoc(getattr(surgery, name)) or ""
    found = re.search(r"^( *)Examples?:\n((?:\1 +.*\n|\n)+)", text + "\n", re.MULTILINE)
    return inspect.cleandoc(found.group(2)) if found else ""


def zeros(rows: int, columns: int, _: int = 0) -> torch.nn.Linear:
    """A layer that gives zeros."""
    layer = torch.nn.Linear(rows, columns, bias=False)
    torch.nn.init.zeros_(layer.weight)
    return layer


@dataclass(frozen=True)
class Mine(surgery.Method):
    """A module at a port of each attention, by the code of an example."""

    name = "mine"
    kinds = ("attention",)
    learns = False
    code: str = 'site.port("output").insert(torch.nn.Identity(), name="mine")'

    def splice(self, site: surgery.OpenSite) -> None:
        names = {"site": site, "port": site.port("query"), "torch": torch, "surgery": surgery}
        exec(self.code, names | {"LowRank": zeros, "rank": 2})


@cache
def spliced(splices: tuple[str, ...]) -> Any:
    """A small model with these splices."""
    model = make_model("fused")
    for name in splices:
        surgery.splice(model, surgery.method("lora", rank=2), name=name)
    return model


def names_for(folder: Path, splices: tuple[str, ...] = ("first", "second")) -> dict[str, Any]:
    """What examples may use."""
    model, source = copy.deepcopy(spliced(splices)), make_model("fused")
    surgery.save(model, folder / "adapter")
    surgery.save(model, folder / "adapters/42", only=splices[0])
    sites, inputs = surgery.locate(model), {"input_ids": torch.ones(2, 6, dtype=torch.long)}
    model(**inputs)
    heads, keys = torch.randn(2, 4, 6, 8), torch.randn(4, 3, 8)
    return {
        "surgery": surgery, "torch": torch, "model": model, "sites": sites, "base": source,
        "tuned": source, "site": sites.attention[0],
        "inputs": inputs, "batches": [{**inputs, "labels": inputs["input_ids"]}],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "node": torch.fx.Graph().placeholder("x"),
        "x": torch.randn(2, 6, 32), "y": torch.randn(2, 6, 32), "direction": torch.randn(32),
        "weight": torch.randn(32, 32), "a": torch.randn(2, 32), "b": torch.randn(2, 32),
        "merged": torch.randn(2, 6, 32), "query": heads, "lse": torch.randn(2, 4, 6), "keys": keys,
        "values": keys, "Mine": Mine, "MyFFN": lambda width: torch.nn.Linear(32, 32),
        "Edit": torch.nn.Linear, "dataclass": dataclass, "F": torch.nn.functional,
        "self": SimpleNamespace(a=torch.randn(2, 32), b=torch.randn(2, 32), scale=0.5),
    }  # fmt: skip


def run(name: str, text: str, names: dict[str, Any]) -> None:
    """Run an example."""
    if ">>>" in text:
        parsed = doctest.DocTestParser().get_doctest(text, names, name, None, 0)
        told: list[str] = []
        doctest.DocTestRunner(optionflags=FLAGS).run(parsed, out=told.append)
        assert not told, "".join(told)
        return
    codes = re.findall(r"``(.+?)``", text, re.DOTALL)
    assert codes, f"{name}: no code in {text!r}"
    for code in codes:
        compiled = compile(inspect.cleandoc(code), name, "exec")
        if name in ("OpenSite", "OpenPort"):
            surgery.splice(names["model"], Mine(code), name=name)
        else:
            exec(compiled, names)


def test_each_public_name_has_an_example() -> None:
    assert [name for name in NAMES if not example_of(name)] == []
    assert set(surgery.__all__) >= FORMS


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OTHER_LIBRARIES])
@pytest.mark.filterwarnings("ignore")  # an example is a user's program
def test_an_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    offered = registry()._offered
    monkeypatch.setattr(registry(), "_offered", {**offered, "method": dict(offered["method"])})
    given = [SPLICES[name]] if name in SPLICES else []
    run(name, example_of(name), names_for(tmp_path, *given))


@pytest.mark.parametrize("name", OTHER_LIBRARIES)
def test_an_example_that_needs_more_names_a_test_and_compiles(name: str) -> None:
    file = OTHER_LIBRARIES[name].rpartition(": ")[2]
    root = Path(__file__).parents[2]
    assert f"surgery.{name}(" in (root / file).read_text()
    for code in re.findall(r"``(.+?)``", example_of(name), re.DOTALL):
        compile(code, name, "exec")


@pytest.mark.parametrize("text", [">>> 1 + 1\n3", "``surgery.no_such_name``"])
def test_an_example_that_is_wrong_is_found(text: str, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, AttributeError)):
        run("wrong", text, names_for(tmp_path))
