"""Hooks of modules that a graph passes through fire as in the base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.forwards import Attention, pair, tokens
from tests.support.models import NAMES, build, inputs, logits
from tests.support.splices import with_inducer_and_lora


class Wrapped(nn.Module):
    """The projections and the output in modules of their own, as encoders have it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()
        self.inner.outward = nn.Identity()  # type: ignore[assignment]
        self.outward = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outward(self.inner(x))
        return out


@pytest.mark.parametrize(
    "register", ["register_full_backward_hook", "register_full_backward_pre_hook"]
)
def test_backward_hooks_inside_a_host_fire(register: str) -> None:
    base, model = pair(Wrapped)
    seen: list[list[Tensor]] = []
    for each in (base, model):
        found: list[Tensor] = []
        getattr(each.inner, register)(lambda module, *grads, f=found: f.append(grads[0][0]))
        each(tokens().requires_grad_()).sum().backward()
        seen.append(found)
    assert len(seen[0]) == len(seen[1]) == 1
    torch.testing.assert_close(seen[1][0], seen[0][0])


@pytest.mark.parametrize("name", NAMES)
def test_forward_hooks_on_any_module_fire_once_with_the_same_tensors(name: str) -> None:
    expected, seen = watch_all(build(name), name), watch_all(with_inducer_and_lora(name), name)
    for path, outputs in expected.items():
        assert len(seen[path]) == len(outputs), path
        assert all(map(torch.equal, seen[path], outputs)), path


def watch_all(model: Any, name: str) -> dict[str, list[torch.Tensor]]:
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor):
                seen.setdefault(path, []).append(first)

        return hook

    for path, module in model.named_modules():
        module.register_forward_hook(watch(path), with_kwargs=True)
    logits(model, inputs(name))
    return seen


def test_a_hook_that_changes_an_output_still_does() -> None:
    model, case = with_inducer_and_lora("roberta"), inputs("roberta")
    before = logits(model, case)
    inner = model.roberta.encoder.layer[0].attention.self
    handle = inner.register_forward_hook(lambda m, a, o: (o[0] * 2, *o[1:]))
    assert not torch.equal(logits(model, case), before)
    handle.remove()
    assert torch.equal(logits(model, case), before)
