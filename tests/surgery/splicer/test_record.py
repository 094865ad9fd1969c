"""Tests of the record of a splice."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

import surgery
from tests.support.models import build


def held(structure: Any, seen: set[int]) -> list[Tensor]:
    """The tensors that an object refers to, through dataclasses and containers."""
    if id(structure) in seen:
        return []
    seen.add(id(structure))
    if isinstance(structure, Tensor):
        return [structure]
    if isinstance(structure, dict):
        parts = list(structure.values())
    elif isinstance(structure, (list, tuple, set, frozenset)):
        parts = list(structure)
    else:
        parts = list(vars(structure).values()) if hasattr(structure, "__dict__") else []
    return [tensor for part in parts for tensor in held(part, seen)]


@pytest.mark.parametrize("name", ["lora", "prompt"])
def test_a_record_keeps_nothing_of_the_example(name: str) -> None:
    model = build("gpt2")
    report = surgery.splice(model, surgery.method(name))
    sites = [inserted.site for inserted in report.inserted]
    assert held(sites, {id(model)}) == []
