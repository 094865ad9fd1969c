"""Rows: train a few rows of a parameter, such as the embeddings of new tokens, and no others.

The gradient of the other rows is zeroed as it arrives, before anything is clipped or accumulated,
so a clipping norm never counts it. Weight decay must be kept from such a parameter by the loop, as
it would move the other rows too: :func:`trained_rows` names them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from surgery.errors import SpliceError, suggest

_ROWS = "_surgery_rows"


class _Only:
    """A gradient hook: zero but in some rows."""

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows = list(rows)

    def __call__(self, gradient: Tensor) -> Tensor:
        kept = torch.zeros_like(gradient)
        kept[self.rows] = gradient[self.rows]
        return kept


def train_rows(model: nn.Module, name: str, rows: Sequence[int]) -> None:
    """Train these rows of the parameter ``name``, beside what is trained already.

    Call it after :func:`surgery.freeze_base`. ``surgery.save`` stores these rows alone. A tied
    parameter (an embedding that is the output projection too) has one name in
    ``model.named_parameters()``; take that.

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
    hooks: dict[str, _Only] = vars(model).setdefault(_ROWS, {})
    if name not in hooks:
        hooks[name] = _Only(rows)
        own[name].register_hook(hooks[name])  # type: ignore[no-untyped-call]
    hooks[name].rows = list(rows)


def trained_rows(model: nn.Module) -> dict[str, list[int]]:
    """Parameters of which only some rows are trained, and which."""
    hooks: dict[str, _Only] = vars(model).get(_ROWS, {})
    return {name: hook.rows for name, hook in hooks.items()}


def fits(model: nn.Module, name: str, rows: Sequence[int], saved: Tensor) -> bool:
    """Has the model a parameter that these saved rows are rows of?"""
    own = dict(model.named_parameters())
    return name in own and max(rows) < own[name].shape[0] and own[name].shape[1:] == saved.shape[1:]
