"""Train single rows of a parameter, such as the embeddings of new tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SpliceError, suggest
from surgery.interop import is_sharded
from surgery.splicer import look_up, record_of


class RowGradient:
    """A gradient hook of a parameter: the gradient is zero outside the given rows.

    ``copy.deepcopy`` and pickle lose the hooks of a tensor. So a copy of this object registers
    itself on the copied parameter.
    """

    def __init__(self, parameter: nn.Parameter, rows: Sequence[int]) -> None:
        self.parameter, self.rows = parameter, list(rows)
        trained = parameter.requires_grad
        parameter.requires_grad_(True)  # a tensor that requires no gradient refuses hooks
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

    Call ``train_rows`` after :func:`surgery.freeze_base`, which resets it; removing or merging the
    last splice resets it, too. ``surgery.save`` stores these rows alone.

    Args:
        model: a spliced model.
        name: a name in ``model.named_parameters()``. A tied parameter, such as an embedding that is
            also the output projection, has one name there.
        rows: indices along the first axis; they join those of earlier calls.

    Raises:
        SpliceError: there is no such parameter, or no such row, or the parameter is sharded.

    Example:
        ``surgery.train_rows(model, "transformer.wte.weight", [48, 49])``
    """
    own = dict(model.named_parameters())
    if name not in own:
        raise SpliceError(f"no parameter {name!r} in the model. {suggest(name, own)}")
    if is_sharded(own[name]):
        raise SpliceError(
            f"{name} is sharded over processes, and its rows with it, so single rows cannot be "
            "trained. Call train_rows before the model is sharded (fully_shard, "
            "deepspeed.initialize), or load the base without tp_plan=."
        )
    count = own[name].shape[0]
    wrong = [row for row in rows if not 0 <= row < count]
    if wrong or not rows:
        raise SpliceError(
            f"{name} has rows 0 to {count - 1}; asked for {wrong or 'none'}. "
            "Resize the embedding before training its new rows."
        )
    own[name].requires_grad_(True)
    hooks: dict[str, RowGradient] = record_of(model).rows
    before: Sequence[int] = ()
    if name in hooks:
        hooks[name].handle.remove()
        before = hooks[name].rows
    hooks[name] = RowGradient(own[name], sorted({*before, *rows}))


def trained_rows(model: nn.Module) -> dict[str, list[int]]:
    """Return the rows that are trained of each parameter of which single rows are trained.

    Raises:
        SpliceError: such a parameter has been replaced, so that its gradient hook is lost.

    Example:
        >>> surgery.trained_rows(model)
        {}
    """
    hooks: dict[str, RowGradient] = look_up(model).rows
    own = dict(model.named_parameters()) if hooks else {}
    lost = [name for name, hook in hooks.items() if own.get(name) is not hook.parameter]
    if lost:
        raise SpliceError(
            f"{lost[0]} is another parameter now (load_state_dict(assign=True) replaces them), so "
            "all its rows would be trained. Call surgery.freeze_base and surgery.train_rows again."
        )
    return {name: hook.rows for name, hook in hooks.items()}
