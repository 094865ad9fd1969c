"""Training: what is trained, what is frozen, and how much that is."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.adapter.parameters import spliced_parameters
from surgery.errors import SpliceError, suggest
from surgery.interop import huggingface
from surgery.splicer import ROWS, forget_rows, records

_KEPT = "_surgery_kept"


_log = logging.getLogger("surgery")


def kept_parameters(model: nn.Module) -> list[str]:
    """Names of base parameters that ``freeze_base`` left trainable."""
    names: list[str] = vars(model).get(_KEPT, [])
    return names


@dataclass(frozen=True)
class Frozen:
    """What ``freeze_base`` did: which base parameters stay trainable, which of them are fresh."""

    kept: tuple[str, ...]
    fresh: tuple[str, ...]
    frozen: int
    rows: tuple[str, ...] = ()

    def __repr__(self) -> str:
        text = f"froze {self.frozen:,} parameters of the base"
        if self.fresh:
            text += (
                f"; still trained, because no weights were loaded for them: {', '.join(self.fresh)}"
            )
        if self.rows:
            text += (
                f"; single rows are trained no more of {', '.join(self.rows)}: call "
                "surgery.train_rows again"
            )
        asked = [n for n in self.kept if n not in self.fresh]
        return text + (f"; still trained, as asked: {', '.join(asked)}" if asked else "")


def freeze_base(model: nn.Module, keep: Sequence[str] = (), fresh: bool = True) -> Frozen:
    """Train only what was inserted, and what is kept beside it.

    Args:
        model: a spliced model.
        keep: names of modules or parameters of the base that stay trainable. They are saved along.
        fresh: also keep what ``from_pretrained`` found no weights for, such as a new
            classification head. It says so.

    Raises:
        SpliceError: nothing is spliced, or a name in ``keep`` fits nothing.
    """
    if not records(model):
        raise SpliceError(
            f"nothing is spliced into this {type(model).__name__}, so nothing would be trained. "
            "Call surgery.splice first."
        )
    rows = tuple(trained_rows(model))
    forget_rows(model)
    inserted = {id(parameter) for _, parameter in spliced_parameters(model)}
    base = [name for name, p in model.named_parameters() if id(p) not in inserted]
    kept: dict[str, None] = {}
    for wish in keep:
        found = [name for name in base if name == wish or name.startswith(wish + ".")]
        if not found:
            parts = {".".join(n.split(".")[:i]) for n in base for i in range(1, n.count(".") + 2)}
            raise SpliceError(
                f"keep={wish!r}: no module or parameter of that name. {suggest(wish, parts)}"
            )
        kept.update(dict.fromkeys(found))
    new = [n for n in huggingface.fresh_parameters(model) if n in base] if fresh else []
    kept.update(dict.fromkeys(new))
    frozen = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in inserted or name in kept)
        frozen += 0 if parameter.requires_grad else parameter.numel()
    vars(model)[_KEPT] = list(kept)
    result = Frozen(tuple(kept), tuple(new), frozen, rows)
    if new or rows:
        _log.warning("surgery: %r", result)
    return result


def keep_also(model: nn.Module, names: Sequence[str]) -> None:
    """Count these parameters of the base among those that are trained and saved along."""
    vars(model)[_KEPT] = list(dict.fromkeys([*vars(model).get(_KEPT, []), *names]))


def warn_of_replaced(model: nn.Module, kept: dict[str, Tensor], folder: Any) -> None:
    """Warn if these take the place of what was kept for other splices: a model has one head."""
    own, others = dict(model.named_parameters()), list(records(model))
    known = kept.keys() & set(kept_parameters(model)) if others else ()
    lost = sorted(n for n in known if not torch.equal(own[n], kept[n].to(own[n])))
    if lost:
        warnings.warn(
            f"the adapter in {folder} brings its own {', '.join(lost[:5])}, in place of those that "
            f"were trained with {', '.join(others)}. Load each into a copy of the base to have "
            "both.",
            stacklevel=3,
        )


class _Only:
    """A gradient hook on a parameter: zero but in some rows. Copies of the model get their own."""

    def __init__(self, parameter: nn.Parameter, rows: Sequence[int]) -> None:
        self.parameter, self.rows = parameter, list(rows)
        trained = parameter.requires_grad
        parameter.requires_grad_(True)  # else it takes no hook
        self.handle = parameter.register_hook(self)  # type: ignore[no-untyped-call]
        parameter.requires_grad_(trained)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Only:
        return _Only(copy.deepcopy(self.parameter, memo), self.rows)

    def __reduce__(self) -> Any:
        return _Only, (self.parameter, self.rows)

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
    hooks: dict[str, _Only] = vars(model).setdefault(ROWS, {})
    before: Sequence[int] = ()
    if name in hooks:
        hooks[name].handle.remove()
        before = hooks[name].rows
    hooks[name] = _Only(own[name], sorted({*before, *rows}))


def trained_rows(model: nn.Module) -> dict[str, list[int]]:
    """Parameters of which only some rows are trained, and which."""
    hooks: dict[str, _Only] = vars(model).get(ROWS, {})
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
