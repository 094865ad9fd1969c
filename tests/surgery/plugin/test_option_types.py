"""Options have the types of their fields: 3,000 values of every option of every method."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch

import surgery
from tests.support.models import build
from tests.support.splices import untouched


@dataclass(frozen=True)
class Typed(surgery.Method):
    name = "typed"
    whole: int = 1
    number: float = 1.0
    flag: bool = False
    text: str = "a"
    choice: Literal["a", "b"] = "a"
    either: float | Literal["learned"] = 1.0
    several: tuple[str, ...] = ("a",)
    size: tuple[int, float] = (1, 2.0)
    pairs: Mapping[str, int] = field(default_factory=dict)
    maybe: int | None = None
    anything: Any = None

    def __post_init__(self) -> None:
        self.require(self.whole < 5, "whole", "less than 5")


@pytest.mark.parametrize(
    ("option", "value", "wish"),
    [
        ("whole", 2.5, "a whole number"),
        ("whole", "4", r"a whole number: 4, without quotes\."),
        ("number", "1e-3", r"a finite number: 1e-3, without quotes\."),
        ("whole", True, "a whole number"),
        ("whole", 5, "less than 5"),
        ("number", "x", "a finite number"),
        ("number", math.nan, "a finite number"),
        ("number", 10**5000, "a finite number"),
        ("flag", 1, "True or False"),
        ("text", None, "a text"),
        ("choice", 3, "one of 'a', 'b'"),
        ("either", [], "a finite number or one of 'learned'"),
        ("several", 5, "a list, each of it a text"),
        ("several", [1], "a list, each of it a text"),
        ("several", {"a": 1}, "a list, each of it a text"),
        ("size", ["x", 1.0], "a list of 2: a whole number, a finite number"),
        ("size", [1], "a list of 2: a whole number, a finite number"),
        ("size", 3, "a list of 2: a whole number, a finite number"),
        ("pairs", [("a", 1)], "a mapping from a text to a whole number"),
        ("pairs", {"a": "b"}, "a mapping from a text to a whole number"),
        ("maybe", "a", "a whole number or None"),
    ],
    ids=lambda x: str(x)[:20] if not isinstance(x, int) or x < 9 else "large",
)
def test_another_type_is_refused_with_what_it_must_be(option: str, value: Any, wish: str) -> None:
    with pytest.raises(
        surgery.MethodError, match=f"{option}=.* is not possible. It must be {wish}"
    ):
        Typed(**{option: value})


def test_values_of_the_type_are_accepted() -> None:
    assert Typed(several=["a", "b"]).several == ("a", "b")  # type: ignore[arg-type]
    assert Typed(size=[3, 4.5]).size == (3, 4.5)  # type: ignore[arg-type]
    assert Typed(several="ab").several == ("ab",)  # type: ignore[arg-type]
    assert Typed(number=3, either="learned", maybe=2, anything=object).number == 3
    assert Typed(**json.loads(json.dumps(Typed().options()))) == Typed()


HUGE: list[Any] = [10**6, 2**31, 2**63, 10**18, 10**30, -(10**18), 10**400, 1e308, -1e308, 1e-320]
ODD: list[Any] = [
    *HUGE, None, True, False, 0, -1, 1, 2, 7, 0.0, -0.0, 0.5, 1.0, 2.5, -0.1, math.nan, math.inf,
    -math.inf, 1j, "", "a", "4", "nan", "none", "query", "learned", "x" * 10_000, "\ud800", "\0",
    b"a", [], [1], ["query"], ["query"] * 3, [["query"]], (), ("query", 1), {}, {"a": 1}, {"(": 1},
    {"a": 0}, {"(.*.*)*a": 1}, {1: 1}, {"a": "b"}, {"query"}, object(), int, len, Ellipsis,
    range(3), torch.ones(2), torch.tensor(2), torch.float32, Exception(), iter("a"),
]  # fmt: skip


@pytest.mark.slow
def test_any_value_of_any_option_is_accepted_or_a_method_error() -> None:
    """What is accepted survives JSON; what is neither huge nor refused is spliced in or refused."""
    tried, accepted = 0, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, cls in surgery.methods().items():
            for option in [f.name for f in dataclasses.fields(cls)]:
                for value in ODD:
                    tried += 1
                    try:
                        made = surgery.method(name, **{option: value})
                        made.check_declared()
                    except (surgery.MethodError, surgery.PortError):
                        continue
                    assert surgery.method(name, **json.loads(json.dumps(made.options()))) == made
                    if value not in HUGE:
                        accepted.append(made)
        assert tried >= 3000
        for made in random.Random(0).sample(accepted, 60):
            model = build("gpt2")
            try:
                surgery.splice(model, made)
            except surgery.SurgeryError:
                assert untouched(model)


@pytest.mark.parametrize("options", [{"rank": 10**18}, {"rank": 10**30}, {"rank": 10**12}], ids=str)
def test_a_size_that_no_memory_has_is_an_error_of_the_splice(options: dict[str, Any]) -> None:
    model = build("gpt2")
    with pytest.raises(surgery.SpliceError, match="method 'lora' fails in its splice"):
        surgery.splice(model, surgery.method("lora", **options))
    assert untouched(model)


def test_the_name_of_a_method_is_a_text() -> None:
    for name in (5, ["lora"], None):
        with pytest.raises(surgery.MethodError, match="the name of a method is a text"):
            surgery.method(name)  # type: ignore[arg-type]
    with pytest.raises(surgery.MethodError, match="'lora' has no option 'name'"):
        surgery.method("lora", name="x")
