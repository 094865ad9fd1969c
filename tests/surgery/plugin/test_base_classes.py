"""Tests of what a method declares and of the values of its options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch.nn.functional as F

import surgery
from tests.support.custom_methods import Custom
from tests.support.models import build


@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        ("lora", {"rank": 0}, "rank=0 is not possible"),
        ("lora", {"dropout": 1.0}, "dropout=1.0 is not possible"),
        ("inducer", {"value_rank": 0}, "value_rank=0 is not possible"),
        ("inducer", {"init": "random"}, "'zero' or 'paper'"),
    ],
)
def test_bad_option_values(name: str, options: dict[str, Any], part: str) -> None:
    with pytest.raises(surgery.MethodError, match=part):
        surgery.method(name, **options)


def test_a_text_is_no_truth_value() -> None:
    with pytest.raises(surgery.MethodError, match=r"lora.*bias='no' must be True or False"):
        surgery.method("lora", bias="no")


def test_what_a_class_declares_is_checked() -> None:
    model = build("gpt2")

    @dataclass(frozen=True)
    class Kinds(Custom):
        kinds = ("blocks",)

    @dataclass(frozen=True)
    class Options(surgery.Method):
        name, kinds = "options", ("ffn",)
        act: Any = F.gelu

    for method, what in (
        (Kinds(), "no kind of site 'blocks'. Did you mean 'block'"),
        (Custom(None, "exakt"), "start='exakt' must be one of exact, gated, none"),
        (Options(), "options': act=.* cannot be written as JSON"),
    ):
        with pytest.raises(surgery.MethodError, match=what):
            surgery.splice(model, method)
