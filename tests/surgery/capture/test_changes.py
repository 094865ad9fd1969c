"""Whatever changes in the state that a forward depends on, the next call follows it."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import surgery
from tests.support.forwards import Attention, tokens


class Scale:
    """An object that a module delegates to; ``factor`` may come from the class or the object."""

    factor: Any = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.factor


class Slotted:
    __slots__ = ("factor",)

    def __init__(self, factor: float) -> None:
        self.factor = factor


class Aliased:
    """A config whose attribute has a second name, as those of transformers have."""

    def __init__(self, factor: float) -> None:
        self.inner = factor

    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, "inner" if name == "factor" else name)


FLAGS = SimpleNamespace(factor=1.0)
TABLE: dict[str, Any] = {"factor": 1.0}
FACTOR = 1.0
OBJECT = Scale()


def rotate(x: Tensor) -> Tensor:
    return x


def times(factor: float) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        return x * factor

    return run


class Deep(Attention):
    """Attention whose output depends on state of every kind."""

    factor: Any = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.processor: Any = Scale()
        self.slotted, self.config = Slotted(1.0), Aliased(1.0)
        self.names, self.space = {"factor": 1.0}, SimpleNamespace(factor=1.0, inner=Scale())
        self.list, self.nested = [1.0, 1.0], {"a": [Scale()]}
        self.partial = functools.partial(torch.mul, other=1.0)
        self.closure = times(1.0)
        self.blocks = nn.ModuleList([nn.Identity()])
        self.register_buffer("buffer", torch.ones(16), persistent=False)
        self.state = {"tensor": torch.ones(16)}

    @property
    def computed(self) -> Any:
        return self.names["factor"]

    def method(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor, *, scale: Any = OBJECT) -> Tensor:
        y = self.processor(super().forward(x)) * self.factor * self.slotted.factor
        y = y * self.config.factor * self.computed * self.space.factor * self.space.inner.factor
        y = y * sum(self.list) * self.nested["a"][0].factor
        y = self.closure(self.partial(y)) * FLAGS.factor * TABLE["factor"] * FACTOR * OBJECT.factor
        for block in self.blocks:
            y = block(y)
        y = y[..., : len(self.buffer)] * self.state["tensor"] * self.buffer
        return self.method(rotate(F.tanh(y) * math.sqrt(scale.factor)))


def _doubled(self: Any, x: Tensor) -> Tensor:
    return x * 2


def _other_forward(self: Any, x: Tensor) -> Tensor:
    y: Tensor = Attention.forward(self, x) * self.names["factor"] - 1
    return y


Change = Callable[[Any, pytest.MonkeyPatch, float], object]
HERE = __name__
CHANGES: dict[str, Change] = {
    "a processor is replaced": lambda m, p, c: setattr(m, "processor", times(c)),
    "a field of the processor": lambda m, p, c: setattr(m.processor, "factor", c),
    "a method of the processor": lambda m, p, c: p.setattr(
        Scale, "__call__", lambda self, x: x * self.factor * c
    ),
    "an attribute of a class": lambda m, p, c: p.setattr(Scale, "factor", c),
    "an attribute of the module's class": lambda m, p, c: p.setattr(Deep, "factor", c),
    "an attribute hides that of the class": lambda m, p, c: setattr(m, "factor", c),
    "a slot": lambda m, p, c: setattr(m.slotted, "factor", c),
    "an attribute by its second name": lambda m, p, c: setattr(m.config, "inner", c),
    "an entry of a dict": lambda m, p, c: m.names.update(factor=c),
    "an entry of a list": lambda m, p, c: m.list.__setitem__(0, c),
    "a longer list": lambda m, p, c: m.list.append(c),
    "a namespace": lambda m, p, c: setattr(m.space, "factor", c),
    "an object in a namespace": lambda m, p, c: setattr(m.space.inner, "factor", c),
    "an object in a list in a dict": lambda m, p, c: setattr(m.nested["a"][0], "factor", c),
    "a keyword of a partial": lambda m, p, c: m.partial.keywords.update(other=c),
    "a partial is replaced": lambda m, p, c: setattr(m, "partial", functools.partial(torch.add, c)),
    "what a closure holds": lambda m, p, c: setattr(m.closure.__closure__[0], "cell_contents", c),
    "a default": lambda m, p, c: p.setattr(Deep.forward, "__kwdefaults__", {"scale": Slotted(c)}),
    "code is replaced": lambda m, p, c: p.setattr(rotate, "__code__", (lambda x: x * 2).__code__),
    "a module's global": lambda m, p, c: p.setitem(globals(), "FACTOR", c),
    "a global namespace": lambda m, p, c: p.setattr(FLAGS, "factor", c),
    "a global dict": lambda m, p, c: p.setitem(TABLE, "factor", c),
    "a global object": lambda m, p, c: p.setattr(OBJECT, "factor", c),
    "a global function": lambda m, p, c: p.setitem(globals(), "rotate", torch.sin),
    "a function of torch": lambda m, p, c: p.setattr(F, "tanh", torch.sigmoid),
    "the attention function of torch": lambda m, p, c: p.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v: (q @ k.mT * c).softmax(-1) @ v
    ),
    "a method of the class": lambda m, p, c: p.setattr(Deep, "method", _doubled),
    "a method of the object": lambda m, p, c: setattr(m, "method", torch.sin),
    "a property": lambda m, p, c: p.setattr(Deep, "computed", property(lambda self: c)),
    "the forward of the class": lambda m, p, c: p.setattr(Deep, "forward", _other_forward),
    "a block more": lambda m, p, c: m.blocks.append(nn.Tanh()),
    "a buffer": lambda m, p, c: setattr(m, "buffer", torch.full((16,), c)),
    "a tensor in a dict": lambda m, p, c: m.state.update(tensor=torch.full((16,), c)),
    "a tensor in place": lambda m, p, c: m.state["tensor"].fill_(c),
}


def _spliced_and_plain() -> tuple[Any, Any]:
    """A model with LoRA spliced in, and one whose weights have LoRA's product added by hand."""
    torch.manual_seed(0)
    plain = Deep().eval()
    model = copy.deepcopy(plain)
    surgery.splice(
        model, surgery.method("lora", rank=2, ports=("output",)), example_inputs=tokens()
    )
    added = model.lora_output
    with torch.no_grad():
        added.b.normal_(0, 0.1)
        plain.outward.weight += added.scale * (added.a.T @ added.b).T
    return model, plain


def _agree(model: nn.Module, plain: nn.Module) -> None:
    x = tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_followed(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = _spliced_and_plain()
    _agree(model, plain)
    before = plain(tokens())
    for each in (model, plain):
        CHANGES[change](each, monkeypatch, 2.0)
    assert not torch.allclose(plain(tokens()), before), "the change changes nothing"
    for _ in range(2):
        _agree(model, plain)


@given(st.lists(st.tuples(st.sampled_from(sorted(CHANGES)), st.sampled_from([0.5, 1.0, 2, True]))))
def test_every_sequence_of_changes_is_followed(changes: list[tuple[str, float]]) -> None:
    model, plain = _spliced_and_plain()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes:
            for each in (model, plain):
                with contextlib.suppress(AttributeError, TypeError):  # an earlier change hides it
                    CHANGES[name](each, patch, value)
            try:
                plain(tokens())
            except (TypeError, AttributeError, RuntimeError):
                return  # nonsense for the base, too
            _agree(model, plain)


def test_an_attention_that_is_none_any_more_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = _spliced_and_plain()
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: q.sigmoid() * k + v)
    with pytest.raises(surgery.SurgeryError, match="is not recognised in it any more"):
        model(tokens())
    monkeypatch.undo()
    model(tokens())
