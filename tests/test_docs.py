"""The examples in README.md and CONTRIBUTING.md run as they stand."""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from tests.models import build, inputs, logits

ROOT = Path(__file__).parent.parent


def block(file: str) -> str:
    """The first Python example of a document."""
    found = re.search(r"```python\n(.*?)```", (ROOT / file).read_text(), re.DOTALL)
    assert found is not None
    return found.group(1)


def test_the_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("gpt2").save_pretrained(tmp_path / "openai-community/gpt2")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block("README.md"), names)
    assert surgery.summary(names["model"]).inserted > 0
    assert list((tmp_path / "adapter").glob("surgery*"))


@pytest.mark.parametrize("name", ["gpt2", "llama", "roberta"])
def test_the_contributing_example_is_a_method(name: str) -> None:
    module = types.ModuleType("surgery_ia3")
    exec(compile(block("CONTRIBUTING.md"), "surgery_ia3.py", "exec"), vars(module))
    offered: list[type[surgery.Method]] = []
    module.register_methods(offered.append)
    model, case = build(name), inputs(name)
    expected = logits(model, case)
    report = surgery.splice(model, offered[0]())
    assert len(report.inserted) == 6
    assert torch.equal(logits(model, case), expected)
    with torch.no_grad():
        next(p for _, p in surgery.spliced_parameters(model)).mul_(3.0)
    assert not torch.equal(logits(model, case), expected)
