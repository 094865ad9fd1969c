"""Tests of string arguments: a graph is for one value only where the forward reads it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import surgery
from tests.support.forwards import Attention, pair, tokens

MODES = ["mean", "meaner", "sum", "", "m"]
MEAN = MODES[0]


class Kept(nn.Module):
    """What is kept whole, notes the strings that arrive; one of them changes what comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.seen = nn.Linear(16, 16), []

    def forward(self, x: Tensor, *texts: Any, **named: Any) -> Tensor:
        self.seen.append((texts, named))
        y: Tensor = self.map(x)
        return y.mean(-1) if "flat" in texts else y


class PassesOn(Attention):
    """The strings are passed on to a module that is kept whole, and some come back."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = Kept()

    def forward(self, x: Tensor, text: str = "", extra: Any = None, **kwargs: Any) -> Any:
        y = super().forward(x)
        z = self.kept(x, text, extra, **kwargs)
        return y + (z if z.dim() == 3 else z[..., None]), text


def graphs(model: nn.Module) -> int:
    return sum(map(len, surgery.variants(model).values()))


@torch.no_grad()
def test_a_string_that_is_passed_on_arrives_and_needs_no_graph() -> None:
    base, model = pair(PassesOn)
    model(tokens(), "first", {"id": ["a"]}, request="r")
    before = graphs(model)
    for n in range(50):
        call = (tokens(), f"text {n}", {"id": [f"id {n}"]}), {"request": f"r{n}"}
        ours, theirs = model(*call[0], **call[1]), base(*call[0], **call[1])
        assert torch.equal(ours[0], theirs[0])
        assert ours[1] == theirs[1] == f"text {n}"
        assert model.kept.seen[-1] == base.kept.seen[-1] == (call[0][1:], call[1])
    assert graphs(model) == before


@torch.no_grad()
def test_a_string_that_changes_what_a_kept_module_returns_gets_a_graph() -> None:
    base, model = pair(PassesOn)
    for text in ("a", "flat", "b", "flat"):
        assert torch.equal(model(tokens(), text)[0], base(tokens(), text)[0])


class Core(nn.Module):
    """Traced through, as the projection of its output is its sibling."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(16, 48)

    def forward(self, x: Tensor, tag: str, options: Any, mixed: Any) -> Any:
        parts = self.inward(x).chunk(3, -1)
        y = F.scaled_dot_product_attention(
            *(t.unflatten(-1, (2, 8)).transpose(1, 2) for t in parts)
        )
        if options["mode"] == "double" or mixed["mode"] == "triple":
            y = y * 2
        return y.transpose(1, 2).flatten(2) + mixed["x"].mean(), tag


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core, self.outward, self.kept = Core(), nn.Linear(16, 16), Kept()

    def forward(self, x: Tensor, tag: str = "", mode: str = "", other: str = "") -> Any:
        y, back = self.core(x, tag, {"mode": mode}, {"mode": other, "x": x})
        return self.outward(y) + self.kept(x, back)


@torch.no_grad()
def test_strings_go_through_modules_that_are_traced_through() -> None:
    base, model = pair(Split)
    heard: list[Any] = []
    model.core.register_forward_pre_hook(lambda _, args: heard.append(args[1:3]))
    for tag in ("a", "b"):
        for mode in ("", "double", "x"):
            for other in ("", "triple"):
                call = tokens(), tag, mode, other
                assert torch.equal(model(*call), base(*call)), call[1:]
                assert heard[-1] == (tag, {"mode": mode})


def identical(x: Any, y: Any) -> bool:
    return x is y


def by_exception(text: str) -> int:
    try:
        return 2 if re.match("mea", text) else 1
    except TypeError:
        return 1


def by_exact_type(text: str) -> int:
    if type(text) is str:
        return 2 if text == "mean" else 1
    return 1


READS: dict[str, Callable[[str], float]] = {
    "equal": lambda t: 2.0 if t == "mean" else 1.0,
    "unequal": lambda t: 1.0 if t != "mean" else 2.0,
    "equal from the other side": lambda t: 2.0 if "mean" == t else 1.0,  # noqa: SIM300
    "true": lambda t: 2.0 if t else 1.0,
    "in a tuple": lambda t: 2.0 if t in ("mean", "sum") else 1.0,
    "in a set": lambda t: 2.0 if t in {"mean", "sum"} else 1.0,
    "of a dict": lambda t: {"mean": 2.0, "sum": 3.0}.get(t, 1.0),
    "contains": lambda t: 2.0 if "ea" in t else 1.0,
    "length": lambda t: float(len(t)),
    "method": lambda t: 2.0 if t.startswith("mean") else 1.0,
    "upper": lambda t: 2.0 if t.upper() == "MEAN" else 1.0,
    "order": lambda t: 2.0 if t < "n" else 1.0,
    "letter": lambda t: 2.0 if t[:1] == "m" else 1.0,
    "letters": lambda t: float(sum(map(ord, t))),
    "format": lambda t: 2.0 if f"{t}!" == "mean!" else 1.0,
    "percent": lambda t: 2.0 if "%s!" % t == "mean!" else 1.0,  # noqa: UP031
    "str": lambda t: 2.0 if str(t) + "!" == "mean!" else 1.0,
    "repr": lambda t: 2.0 if repr(t) == "'mean'" else 1.0,
    "added": lambda t: 2.0 if "!" + t == "!mean" and t + "!" == "mean!" else 1.0,
    "joined": lambda t: 2.0 if "".join([t]) == "mean" else 1.0,
    "an expression": lambda t: 2.0 if re.match("mea", t) else 1.0,
    "attribute": lambda t: 2.0 if getattr(torch, t, None) == torch.mean else 1.0,
    "keyword": lambda t: 2.0 if "mean" in dict(**{t: 1}) else 1.0,
    "identity": lambda t: 2.0 if identical(t, MEAN) else 1.0,
    "exact type": by_exact_type,
    "exception": by_exception,
}


class Reads(Attention):
    def read(self, text: str) -> float:
        return 1.0

    def forward(self, x: Tensor, text: str = "other") -> Tensor:
        return super().forward(x) * self.read(text)


@pytest.fixture(scope="module")
def reads() -> tuple[Any, Any]:
    return pair(Reads)


@torch.no_grad()
@pytest.mark.parametrize("how", READS)
@pytest.mark.few(12)
def test_a_string_that_is_read_chooses_the_graph(
    how: str, reads: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, model = reads
    monkeypatch.setattr(Reads, "read", staticmethod(READS[how]))
    surgery.refresh(model)
    for text in (*reversed(MODES), MODES[0]):
        assert torch.equal(model(tokens(), text), base(tokens(), text)), text


class Mixed(Attention):
    """Reads some of its strings and numbers, depending on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = Kept()

    def forward(self, x: Tensor, a: str, b: str, step: int, scale: float, **rest: Any) -> Any:
        y = super().forward(x)
        if step > 2:
            y = y * step
        if a == "m" and b.endswith("m"):
            y = -y
        y = y + self.kept(x, b, **rest)
        return y * scale, a


CALLS = st.tuples(
    st.sampled_from(MODES),
    st.sampled_from(MODES),
    st.integers(0, 5),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.dictionaries(st.sampled_from("uv"), st.sampled_from(MODES) | st.integers(0, 3), max_size=2),
)


@pytest.fixture(scope="module")
def mixed() -> tuple[Any, Any]:
    return pair(Mixed, tokens(), "", "", 0, 1.0)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*kinds, each with a graph")
@given(st.lists(CALLS, min_size=2, max_size=8))
def test_strings_and_numbers_in_any_order_give_what_the_base_gives(
    mixed: tuple[Any, Any], calls: list[Any]
) -> None:
    base, model = mixed
    for a, b, step, scale, rest in calls:
        given = tokens(), a, b, step, scale
        ours, theirs = model(*given, **rest), base(*given, **rest)
        assert torch.equal(ours[0], theirs[0])
        assert ours[1] == theirs[1]
        assert model.kept.seen[-1] == base.kept.seen[-1]


@torch.no_grad()
def test_a_counter_that_is_not_read_needs_no_graph(mixed: tuple[Any, Any]) -> None:
    base, model = mixed
    surgery.refresh(model)
    model(tokens(), "", "", 3, 1.0)
    before = graphs(model)
    for step in range(3, 60):
        call = tokens(), "", f"{step}", step, step / 7
        assert torch.equal(model(*call)[0], base(*call)[0])
    assert graphs(model) == before
