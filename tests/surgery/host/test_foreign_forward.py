"""A forward that another library sets on a host, before or after the splice, is taken over."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from tests.support.forwards import Attention, pair, tokens
from tests.support.models import perturb


def fused(self: Any, x: Tensor) -> Tensor:
    """Another implementation of the same attention."""
    q, k, v = self.heads(x)
    y: Tensor = self.merge((q @ k.mT / 8**0.5).softmax(-1) @ v)
    return y


def moved() -> tuple[Any, Any, Tensor]:
    """Base, spliced model with moved parameters, and what the spliced model returns."""
    base, model = pair(Attention)
    perturb(model)
    return base, model, model(tokens())


def test_a_forward_set_after_the_splice_is_spliced_into() -> None:
    base, model, before = moved()
    model.forward = types.MethodType(fused, model)
    torch.testing.assert_close(model(tokens()), before)
    del model.forward
    assert torch.equal(model(tokens()), before)
    model.forward = types.MethodType(fused, model)
    surgery.remove(model)
    assert torch.equal(model(tokens()), fused(base, tokens()))
    assert model.forward.__func__ is fused


def test_a_forward_set_before_the_splice_is_spliced_into() -> None:
    model: Any = Attention().eval()
    model.forward = types.MethodType(fused, model)
    base = model(tokens())
    surgery.splice(model, surgery.method("lora", rank=2), example_inputs=tokens())
    assert torch.equal(model(tokens()), base)
    perturb(model)
    assert not torch.equal(model(tokens()), base)
    surgery.remove(model)
    assert model.forward.__func__ is fused
    assert torch.equal(model(tokens()), base)


@pytest.mark.parametrize("kind", ["closure", "partial", "two"])
def test_functions_around_the_forward_are_called_around_the_host(kind: str) -> None:
    base, model, before = moved()
    calls: list[str] = []

    def wrap(module: Any, name: str) -> Any:
        found = module.forward

        def around(inner: Any, x: Tensor) -> Any:
            calls.append(name)
            return inner(x) + 1

        if kind == "partial":
            module.forward = functools.partial(around, found)
        else:
            module.forward = lambda x: around(found, x)
        return found

    first = wrap(model, "a")
    if kind == "two":
        wrap(model, "b")
    times = 2 if kind == "two" else 1
    for _ in range(2):
        torch.testing.assert_close(model(tokens()), before + times)
    assert calls == ["b", "a"] * 2 if kind == "two" else ["a", "a"]
    model.forward = first
    if kind == "two":
        torch.testing.assert_close(model(tokens()), before + 1)
        model.forward = first
    assert torch.equal(model(tokens()), before)
    surgery.remove(model)
    assert torch.equal(model(tokens()), base(tokens()))
    assert first(tokens()).equal(base(tokens()))  # whoever kept the method may go on calling it


def test_a_function_that_never_calls_the_host_is_an_error() -> None:
    _, model, _ = moved()
    found = model.forward

    def skips(x: Tensor, around: Any = found) -> Tensor:
        return x

    model.forward = skips
    with pytest.raises(surgery.SurgeryError, match="nothing that is spliced in ran"):
        model(tokens())


REGISTER: list[type] = []


class Registered(Attention):
    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        REGISTER.append(cls)


class Meta(type):
    def __init__(cls, *args: Any) -> None:
        super().__init__(*args)
        REGISTER.append(cls)


class ByMetaclass(Attention, metaclass=Meta):
    pass


@pytest.mark.parametrize("kind", [Registered, ByMetaclass])
def test_no_hook_of_a_class_hears_of_a_splice(kind: type[nn.Module]) -> None:
    before = list(REGISTER)
    base, model = pair(kind)
    assert before == REGISTER
    assert isinstance(model, kind)
    assert torch.equal(model(tokens()), base(tokens()))


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Own(Attention):
    """Attention whose projection weight is its own parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(48, 16) * 0.2)

    def heads(self, x: Tensor) -> list[Tensor]:
        parts = nn.functional.linear(x, self.weight).chunk(3, -1)
        return [t.unflatten(-1, (2, 8)).transpose(1, 2) for t in parts]


@pytest.mark.parametrize("first", ["splice", "parametrization"])
def test_a_class_swapped_by_another_tool_stays(first: str) -> None:
    torch.manual_seed(0)
    base, model = Own().eval(), Own().eval()
    model.load_state_dict(base.state_dict())
    lora = surgery.method("lora", rank=2, ports=("query", "output"))
    parametrize = nn.utils.parametrize.register_parametrization
    if first == "splice":
        surgery.splice(model, lora, example_inputs=tokens())
    for each in (base, model):
        parametrize(each, "weight", Double())
    if first != "splice":
        surgery.splice(model, lora, example_inputs=tokens())
    assert torch.equal(model(tokens()), base(tokens()))
    perturb(model)
    assert not torch.equal(model(tokens()), base(tokens()))
    surgery.remove(model)
    assert torch.equal(model(tokens()), base(tokens()))
    nn.utils.parametrize.remove_parametrizations(model, "weight")
    assert model.weight.equal(base.weight)
    surgery.splice(model, lora, example_inputs=tokens())
    surgery.remove(model)
    assert type(model).__name__ == "Own"
