"""Train single rows of a parameter, such as the embeddings of new tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SpliceError, suggest
from surgery.splicer import look_up, record_of


class RowGradient:
    """A gradient hook on a parameter: zero but in some rows. Copies of the model get their own."""

    def __init__(self, parameter: nn.Parameter, rows: Sequence[int]) -> None:
        self.parameter, self.rows = parameter, list(rows)
        trained = parameter.requires_grad
        parameter.requires_grad_(True)  # else it takes no hook
        self.handle = parameter.register_hook(self)  # type: ignore[no-untyped-call]
        parameter.requires_grad_(trained)

    def __deepcopy__(self, memo: dict[int, Any]) -> RowGradient:
        return RowGradient(copy.deepcopy(self.parameter, memo), self.rows)

    def __reduce__(self) -> Any:
        return RowGradient, (self.parameter, self.rows)

    def __call__(self, gradient: Tensor) -> Tensor:
        kept = torch.zeros_like(gradient)
        kept[self.rows] = gradient[self.rows]
        return kept


def train_rows(model: nn.Module, name: str, rows: Sequence[int]) -> None:
    """Train these rows of the parameter ``name``, beside what is trained already.

    Call it after :func:`surgery.freeze_base`, which forgets such rows; so does removing or merging
    the last splice. ``surgery.save`` stores these rows alone. A tied parameter (an embedding that
    is the output projection too) has one name in ``model.named_parameters()``; take that.

    Raises:
        SpliceError: no such parameter, or a row that it has not.
    """
    own = dict(model.named_parameters())
    if name not in own:
        raise SpliceError(f"no parameter {name!r} in the model. {suggest(name, own)}")
    count = own[name].shape[0]
    wrong = [row for row in rows if not 0 <= row < count]
    if wrong or not rows:
        raise SpliceError(
            f"{name} has rows 0 to {count - 1}; asked for {wrong or 'none'}. "
            "Resize the embedding before you train its new rows."
        )
    own[name].requires_grad_(True)
    hooks: dict[str, RowGradient] = record_of(model).rows
    before: Sequence[int] = ()
    if name in hooks:
        hooks[name].handle.remove()
        before = hooks[name].rows
    hooks[name] = RowGradient(own[name], sorted({*before, *rows}))


def trained_rows(model: nn.Module) -> dict[str, list[int]]:
    """Parameters of which only some rows are trained, and which."""
    hooks: dict[str, RowGradient] = look_up(model).rows
    own = dict(model.named_parameters()) if hooks else {}
    lost = [name for name, hook in hooks.items() if own.get(name) is not hook.parameter]
    if lost:
        raise SpliceError(
            f"{lost[0]} is another parameter now (as load_state_dict(assign=True) makes it), and "
            "all its rows would be trained. Call surgery.freeze_base and train_rows again."
        )
    return {name: hook.rows for name, hook in hooks.items()}


def rows_fit(model: nn.Module, name: str, rows: Sequence[int], saved: Tensor) -> bool:
    """Has the model a parameter that these saved rows are rows of?"""
    own = dict(model.named_parameters())
    return name in own and max(rows) < own[name].shape[0] and own[name].shape[1:] == saved.shape[1:]
