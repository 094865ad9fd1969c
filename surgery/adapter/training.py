"""Choose which parameters of a spliced model are trained, and so which of them are saved.

    inserted parameters             trained, saved
    kept parameters of the base     trained, saved     freeze_base(keep=..., fresh=True)
    single rows of the base's       trained, saved     train_rows (row_training.py)
    the rest of the base            frozen

The same choice is what ``model.save_pretrained`` writes from then on (adapter/checkpoints.py).
``freeze_base`` chooses anew: it resets ``train_rows`` and replaces the list of kept parameters,
which is in the model's record (surgery/splicer/record.py).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.adapter.checkpoints import save_adapter_alone
from surgery.adapter.parameters import kept_tensors, spliced_parameters
from surgery.adapter.row_training import trained_rows
from surgery.adapter.trainer_events import follow_trainers
from surgery.errors import SpliceError, suggest
from surgery.interop import huggingface
from surgery.splicer import forget_rows, record_of, reports, require_spliced, spliced_model

_log = logging.getLogger("surgery")


@dataclass(frozen=True)
class Frozen:
    """The result of ``surgery.freeze_base``. Print it.

    Attributes:
        kept: names of the base parameters that stay trainable.
        fresh: those among them for which ``from_pretrained`` found no weights.
        frozen: how many numbers are frozen.
        rows: names of the parameters for which ``train_rows`` was reset.

    Example:
        ``print(surgery.freeze_base(model, keep=["transformer.ln_f"]).kept)``
    """

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
                f"; train_rows was reset for {', '.join(self.rows)}; call surgery.train_rows again"
            )
        asked = [n for n in self.kept if n not in self.fresh]
        return text + (f"; still trained, as asked: {', '.join(asked)}" if asked else "")


def freeze_base(
    model: nn.Module,
    keep: Sequence[str] = (),
    fresh: bool = True,
    train: str | Sequence[str] | None = None,
) -> Frozen:
    """Freeze the base: train only the inserted parameters, and those that are kept.

    An inserted parameter to which its author has given ``requires_grad=False`` stays frozen.

    From then on ``save_pretrained`` of a transformers model writes the adapter, with all that is
    needed to continue training, so the checkpoints of ``Trainer`` hold no base. It writes the whole
    model, with a warning, if more of the base is trained than this function chose.

    Args:
        model: a spliced model.
        keep: names of modules or parameters of the base that stay trainable and are saved. The
            buffers of such modules, as the statistics of a norm, are saved with them.
        fresh: also keep the parameters for which ``from_pretrained`` found no weights, such as a
            new classification head. A warning in the log names them.
        train: the splices whose parameters are trained, by name; None means all. The others are
            frozen; whether they run is what ``surgery.use`` says.

    Returns:
        the names of the kept parameters, and how much is frozen.

    Raises:
        SpliceError: nothing is spliced in, under a name in ``train``, or the base lacks a name in
            ``keep``.

    Example:
        ``surgery.freeze_base(model, keep=["transformer.ln_f"])``
    """
    model = spliced_model(model)
    names = reports(model) if train is None else train
    trained = [names] if isinstance(names, str) else list(names)
    require_spliced(model, *trained)
    rows = tuple(trained_rows(model))
    forget_rows(model)
    inserted = {id(parameter) for _, parameter in spliced_parameters(model)}
    chosen = {id(p) for name in trained for _, p in spliced_parameters(model, name)}
    chosen -= _frozen_by_their_authors(model)
    base = [name for name, p in model.named_parameters() if id(p) not in inserted]
    kept: dict[str, None] = {}
    for wish in keep:
        found = [name for name in base if name == wish or name.startswith(wish + ".")]
        if not found:
            parts = {".".join(n.split(".")[:i]) for n in base for i in range(1, n.count(".") + 2)}
            raise SpliceError(
                f"keep={wish!r}: the base has no such module or parameter. {suggest(wish, parts)}"
            )
        kept.update(dict.fromkeys(found))
    new = [n for n in huggingface.fresh_parameters(model) if n in base] if fresh else []
    kept.update(dict.fromkeys(new))
    frozen = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in chosen or name in kept)
        frozen += 0 if parameter.requires_grad or id(parameter) in inserted else parameter.numel()
    record_of(model).kept = [*kept, *_buffers_beside(model, kept, keep)]
    save_adapter_alone(model)
    follow_trainers(model)
    result = Frozen(tuple(kept), tuple(new), frozen, rows)
    if new or rows:
        _log.warning("surgery: %r", result)
    return result


def _frozen_by_their_authors(model: nn.Module) -> set[int]:
    """Return the ids of inserted parameters that came with ``requires_grad=False``."""
    every = [inserted for report in reports(model).values() for inserted in report.inserted]
    return {
        id(parameter)
        for inserted in every
        for name, parameter in model.get_submodule(inserted.path).named_parameters()
        if name in inserted.frozen
    }


def _buffers_beside(model: nn.Module, kept: Iterable[str], modules: Sequence[str]) -> list[str]:
    """Return the names of persistent buffers in these modules, and beside kept parameters."""
    owners = {name.rpartition(".")[0] for name in kept}
    persistent = model.state_dict(keep_vars=True).keys()
    found = []
    for name, _ in model.named_buffers():
        beside = name.rpartition(".")[0] in owners
        if name in persistent and (beside or name.startswith(tuple(f"{m}." for m in modules))):
            found.append(name)
    return found


def keep_also(model: nn.Module, names: Sequence[str]) -> None:
    """Add these tensors of the base to the kept ones, which are saved along."""
    record = record_of(model)
    record.kept = list(dict.fromkeys([*record.kept, *names]))


def warn_of_replaced(model: nn.Module, kept: dict[str, Tensor], folder: Any) -> None:
    """Warn if a load replaces parameters of the base that other splices were trained with.

    A model has one head, say: the second adapter brings its own.
    """
    own, others = kept_tensors(model), list(reports(model))
    known = kept.keys() & own.keys() if others else ()
    lost = sorted(n for n in known if not torch.equal(own[n], kept[n].to(own[n])))
    if lost:
        warnings.warn(
            f"the adapter in {folder} brings its own {', '.join(lost[:5])} and replaces those that "
            f"were trained with {', '.join(others)}. To have both, load each into a copy of the "
            "base.",
            stacklevel=3,
        )
