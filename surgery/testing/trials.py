"""Splice a method into a model for a trial, run the model, and compare what it gives.

PYTEST_DONT_REWRITE: the messages are whole as they are.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import surgery
from surgery.testing.shapes import Shape


def spliced(method: surgery.Method, shape: Shape) -> Any:
    """Return a model with the method spliced in and its parameters moved off their start."""
    model = fresh(method, shape)
    perturb(model)
    return copy.deepcopy(model)


def fresh(method: surgery.Method, shape: Shape, model: Any = None) -> Any:
    """Return a model with the method spliced in, as it starts."""
    model = shape.make() if model is None else model
    example = {name: value.to(_like(model, value)) for name, value in shape.inputs.items()}
    surgery.splice(model, method, example_inputs=example)
    return model


def perturb(model: nn.Module) -> None:
    """Move every inserted parameter off its start."""
    torch.manual_seed(2)
    with torch.no_grad():
        for _, parameter in surgery.spliced_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.05)


def outputs(model: Any, shape: Shape, train: bool = False, **changed: Any) -> Tensor:
    """Return the first floating output of a call: logits, or hidden states."""
    torch.manual_seed(3)  # dropout
    given = {**shape.inputs, **changed}
    given = {k: v.to(_like(model, v)) if isinstance(v, Tensor) else v for k, v in given.items()}
    with torch.set_grad_enabled(train):
        found = _first(model(**given))
    assert found is not None, f"the call of {type(model).__name__} gives no floating tensor"
    return found


def _like(model: Any, value: Tensor) -> torch.dtype:
    """Return the dtype that an input must have: the model's, for floating ones."""
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), value.dtype)
    return own if value.is_floating_point() else value.dtype


def _first(value: Any) -> Tensor | None:
    """Return the first floating tensor in what a model gives, the loss aside."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if hasattr(value, "logits"):
        return _first(value.logits)
    inner = value.values() if hasattr(value, "values") else value
    found = map(_first, inner) if isinstance(value, (list, tuple, dict)) else iter(())
    return next((each for each in found if each is not None), None)


def close(a: Tensor, b: Tensor, what: str) -> None:
    """Raise unless ``a`` and ``b`` agree to 1e-4, plus 1e-4 of the largest number in ``b``."""
    gap = (a - b).abs().max().item()
    assert gap <= 1e-4 * (1 + b.abs().max().item()), f"{what}, by {gap:.2g}"


def inserted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the inserted modules, by their paths in the model."""
    reports = surgery.summary(model).reports
    return {i.path: model.get_submodule(i.path) for r in reports for i in r.inserted}
