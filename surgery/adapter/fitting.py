"""Let methods initialise their modules from data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.adapter.parameters import full_state
from surgery.adapter.training_run import trained
from surgery.errors import MethodError, SpliceError
from surgery.interop import evaluating, tensors_in
from surgery.plugin import Method
from surgery.splicer import disabled, reports, require_spliced, spliced_model


def fit(model: nn.Module, batches: Iterable[Mapping[str, Any]], name: str | None = None) -> None:
    """Let methods initialise their modules from data: call ``fit`` of those that have it.

    Args:
        model: a spliced model.
        batches: what ``model(**batch)`` takes: a list or a DataLoader, which several methods can
            go through one after the other.
        name: the splice; None means all that train.

    A fit that fails, or that changes outputs which the method's start had left to the bit, puts
    the modules back as they were.

    Raises:
        SpliceError: nothing is spliced in, or ``batches`` is an iterator, or empty.
        MethodError: no method here fits itself to data, or one changed the outputs of a splice
            that declares an exact start.

    Example:
        >>> surgery.splice(model, surgery.method("eva", rank=8))
        >>> surgery.fit(model, batches[:8])
    """
    require_spliced(spliced_model(model), *([] if name is None else [name]))
    if iter(batches) is batches:
        raise SpliceError(
            "fit: batches is an iterator, which only one method could go through. Pass a list or "
            "a DataLoader."
        )
    found = [(which, method) for which, method in trained(model, "fit") if name in (None, which)]
    if not found:
        names = [name] if name else list(reports(spliced_model(model)))
        raise MethodError(
            f"fit: no method of {', '.join(map(repr, names))} that trains initialises itself from "
            "data (a method does so by its fit)."
        )
    first = next(iter(batches), None)
    if first is None:
        raise SpliceError("fit: batches is empty.")
    for which, method in found:
        _fit(model, which, method, batches, first)


def _fit(model: nn.Module, which: str, method: Method, batches: Any, first: Any) -> None:
    state = {n: t.detach().clone() for n, t in _state(model, which).items()}
    with evaluating(model), torch.no_grad():
        before = _outputs(model, first)
        with disabled(model, which):
            starts = method.start != "none" and _same(_outputs(model, first), before)
        try:
            method.fit(model, batches)
            if starts and not _same(_outputs(model, first), before):
                raise MethodError(
                    f"method {method.name!r}: the start is {method.start}, and fit has changed the "
                    "outputs. Leave at zero what is zero at the start, or declare start 'none'."
                )
        except BaseException:
            for own, tensor in _state(model, which).items():
                tensor.detach().copy_(state[own])
            raise


def _state(model: nn.Module, which: str) -> dict[str, Tensor]:
    return full_state(spliced_model(model), [which])


def _outputs(model: nn.Module, batch: Mapping[str, Any]) -> list[Tensor]:
    made: Any = model(**batch)
    return list(tensors_in(made))


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))
