"""Laws of training: what gets a gradient, and what can never learn.

PYTEST_DONT_REWRITE: the messages are whole as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

import surgery
from surgery.testing.shapes import VOCABULARY, Shape
from surgery.testing.trials import fresh, inserted_modules, outputs, spliced

_STEPS = 4


def gradients_reach_what_was_inserted_and_nothing_else(
    method: surgery.Method, shape: Shape
) -> None:
    """A gradient reaches every inserted parameter but frozen ones, and none of the base."""
    model = spliced(method, shape)
    own = _frozen_by_its_author(model)
    surgery.freeze_base(model, fresh=False)
    inserted = dict(surgery.spliced_parameters(model))
    thawed = [name for name in own if inserted[name].requires_grad]
    assert not thawed, f"{thawed} had requires_grad=False, and freeze_base has changed it"
    trained = [name for name, parameter in inserted.items() if parameter.requires_grad]
    if not trained:
        return
    torch.manual_seed(1)
    (outputs(model, shape, train=True) * torch.randn(1)).square().sum().backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        if name in trained:
            assert parameter.grad is not None, f"no gradient for {name}"
            assert bool((parameter.grad != 0).any()), f"the gradient of {name} is zero"
        elif name in inserted:
            assert parameter.grad is None, f"a gradient for {name}, which has requires_grad=False"
        else:
            assert parameter.grad is None, f"a gradient for {name}, a parameter of the base"


def every_parameter_can_learn(method: surgery.Method, shape: Shape) -> None:
    """From its start, a few steps on random batches give every parameter a gradient."""
    model = fresh(method, shape)
    surgery.freeze_base(model, fresh=False)
    idle = {n: p for n, p in surgery.spliced_parameters(model) if p.requires_grad}
    trained = list(idle.values())
    for step in range(_STEPS if trained else 0):
        torch.manual_seed(10 + step)
        batch = {name: _random_like(name, value) for name, value in shape.inputs.items()}
        out = outputs(model, shape, train=True, **batch)
        (out * torch.randn_like(out)).sum().backward()  # type: ignore[no-untyped-call]
        learn = {n for n, p in idle.items() if p.grad is not None and bool((p.grad != 0).any())}
        idle = {n: p for n, p in idle.items() if n not in learn}
        with torch.no_grad():
            for parameter in trained:
                if parameter.grad is not None:
                    size = parameter.grad.abs().max().clamp(min=1e-12)
                    parameter.sub_(0.01 * parameter.grad / size)
                parameter.grad = None
    assert not idle, (
        f"from the start of the method, {_STEPS} steps on random batches give "
        f"{', '.join(idle)} no gradient but zero, so nothing is ever learned there. Let no two "
        "factors of a product start at zero; zero-initialise the last one alone."
    )


def _random_like(name: str, value: Tensor) -> Tensor:
    """Return an input of the same kind with other values."""
    if value.is_floating_point():
        return torch.randn_like(value)
    if name.endswith("input_ids"):
        return torch.randint(3, VOCABULARY, value.shape)
    return value


def _frozen_by_its_author(model: torch.nn.Module) -> list[str]:
    """Return the inserted parameters that have ``requires_grad=False`` after a splice."""
    assert inserted_modules(model), "splice(site) inserted no module"
    return [name for name, p in surgery.spliced_parameters(model) if not p.requires_grad]
