"""What a forward returns keeps its type: dataclasses, dictionaries, named tuples, plain objects."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from tests.support.forwards import Attention, pair, tokens
from tests.support.models import perturb


@dataclass
class Mixed:
    hidden: Tensor
    extra: Any = None
    made: Any = field(default=None, init=False)
    count: int = 3


@dataclass(frozen=True)
class Frozen:
    hidden: Tensor
    extra: Any = None


class Pair(NamedTuple):
    hidden: Tensor
    extra: Any = None


class Plain:
    def __init__(self, hidden: Tensor, extra: Any = None) -> None:
        self.hidden, self.extra = hidden, extra


class Slotted:
    __slots__ = ("extra", "hidden")

    def __init__(self, hidden: Tensor, extra: Any = None) -> None:
        self.hidden, self.extra = hidden, extra


class MyList(list[Any]):
    pass


class MyTuple(tuple[Any, ...]):
    __slots__ = ()


KINDS: dict[str, Callable[[Tensor, Any], Any]] = {
    "dataclass": Mixed,
    "frozen dataclass": Frozen,
    "named tuple": Pair,
    "plain object": Plain,
    "slots": Slotted,
    "namespace": lambda y, z: SimpleNamespace(hidden=y, extra=z),
    "ModelOutput": lambda y, z: BaseModelOutput(last_hidden_state=y, hidden_states=z),
    "OrderedDict": lambda y, z: OrderedDict(hidden=y, extra=z),
    "dict": lambda y, z: {"hidden": y, "extra": z},
    "list": lambda y, z: [y, z],
    "subclass of list": lambda y, z: MyList([y, z]),
    "subclass of tuple": lambda y, z: MyTuple((y, z)),
    "tuple": lambda y, z: (y, z),
}
WRAP: Callable[[Tensor], Any] = lambda y: y  # noqa: E731


class Returns(Attention):
    def forward(self, x: Tensor) -> Any:
        return WRAP(super().forward(x))


def same(a: Any, b: Any) -> bool:
    """Whether two outputs have the same types all the way down, and the same bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    held = [getattr(a, "__dict__", {}), {n: getattr(a, n) for n in getattr(a, "__slots__", ())}]
    other = [getattr(b, "__dict__", {}), {n: getattr(b, n) for n in getattr(b, "__slots__", ())}]
    inside: Any = list(a.items()) if isinstance(a, dict) else a
    others: Any = list(b.items()) if isinstance(b, dict) else b
    if isinstance(inside, (list, tuple)):
        if len(inside) != len(others):
            return False
        if not all(map(same, list(inside), list(others))):
            return False
    elif not held[0] and not held[1]:
        return bool(a == b)
    return all(
        list(x) == list(y) and all(map(same, x.values(), y.values()))
        for x, y in zip(held, other, strict=True)
    )


@given(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=3), st.data())
def test_outputs_keep_their_types(names: list[str], data: st.DataObject) -> None:
    def wrap(y: Tensor) -> Any:
        made: Any = y
        for name in names:
            made = KINDS[name](y * 2, made) if name != "ModelOutput" else KINDS[name](y, (made,))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "WRAP", wrap)
        base, model = pair(Returns)
        assert same(model(tokens()), base(tokens()))
        perturb(model)
        assert not same(model(tokens()), base(tokens()))
        assert type(model(tokens())) is type(base(tokens()))


def test_an_output_is_made_anew_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "WRAP", lambda y: Mixed(y, extra=[y]))
    _, model = pair(Returns)
    first, second = model(tokens()), model(tokens())
    assert first is not second
    first.extra.append(1)
    assert len(second.extra) == len(model(tokens()).extra) == 1
