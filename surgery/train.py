"""Training: what is trained, what is frozen, and how much that is."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surgery import huggingface
from surgery.errors import SpliceError, suggest
from surgery.report import Report, records
from surgery.rows import forget_rows, trained_rows

_KEPT = "_surgery_kept"
_log = logging.getLogger("surgery")


def spliced_parameters(
    model: nn.Module, name: str | None = None
) -> Iterator[tuple[str, nn.Parameter]]:
    """The inserted parameters of one splice, or of all, with their names in the model.

    One that several inserted modules share comes once.
    """
    seen: set[int] = set()
    for report in records(model).values():
        if name is None or report.name == name:
            for inserted in report.inserted:
                for own, parameter in model.get_submodule(inserted.path).named_parameters():
                    if id(parameter) not in seen:
                        seen.add(id(parameter))
                        yield f"{inserted.path}.{own}", parameter


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """What a saved adapter holds of the inserted modules (see ``Method.plain``), by name."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for report in records(model).values():
        for inserted in report.inserted:
            module: Any = model.get_submodule(inserted.path)
            state = getattr(module, "plain_state", partial(module.state_dict, keep_vars=True))()
            fresh = {n: t for n, t in state.items() if id(t) not in seen}
            seen.update(id(t) for t in fresh.values())
            found |= {f"{inserted.path}.{n}": t for n, t in fresh.items()}
    return found


def full_state(model: nn.Module, names: list[str] | None = None) -> dict[str, Tensor]:
    """Parameters and persistent buffers of inserted modules, of all splices or of some."""
    found: dict[str, Tensor] = {}
    for name in records(model) if names is None else names:
        found |= dict(spliced_parameters(model, name)) | dict(_buffers(model, name))
    return found


def _buffers(model: nn.Module, name: str) -> list[tuple[str, Tensor]]:
    found = []
    for inserted in records(model)[name].inserted:
        module = model.get_submodule(inserted.path)
        named = dict(module.named_buffers())
        found += [(f"{inserted.path}.{n}", named[n]) for n in module.state_dict() if n in named]
    return found


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


@dataclass(frozen=True)
class Summary:
    """Sites, methods and parameter counts of a spliced model. Print it.

    Attributes:
        reports: the splices.  base: parameters of the base.  inserted: parameters inserted.
        stored: values of theirs that a saved adapter holds.
        trainable: parameters that require gradient now.  kept: those of the base among them.
    """

    model: str
    reports: tuple[Report, ...]
    base: int
    inserted: int
    stored: int
    trainable: int
    kept: int

    @property
    def total(self) -> int:
        """All parameters, inserted ones included."""
        return self.base + self.inserted

    @property
    def percent(self) -> float:
        """Inserted parameters, as the papers count: per cent of the base's."""
        return 100 * self.inserted / self.base

    def __repr__(self) -> str:
        lines = [self.model]
        for report in self.reports:
            lines.append(f"  {report.name}: start {report.start}")
            for method in report.methods:
                own = [i for i in report.inserted if i.method is method]
                sites = {i.site.identity for i in own}
                kinds = sorted({i.site.description for i in own})
                lines.append(
                    f"    {method}\n      at {len(sites)} sites ({', '.join(kinds)}), "
                    f"{len(own)} modules, {sum(i.parameters for i in own):,} parameters"
                )
        if self.stored != self.inserted:
            share = 100 * self.stored / self.base
            lines.append(f"  stored    {self.stored:>14,}  {share:.4f} % of the base's")
        lines += [
            f"  inserted  {self.inserted:>14,}  {self.percent:.4f} % of the base's {self.base:,}",
            f"  trainable {self.trainable:>14,}  {100 * self.trainable / self.total:.4f} % of all "
            f"{self.total:,}" + (f", {self.kept:,} of them the base's own" if self.kept else ""),
        ]
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Sites, methods, trainable and total parameters of a model."""
    inserted = {id(p): p for _, p in spliced_parameters(model)}
    base = [p for p in model.parameters() if id(p) not in inserted]
    named = list(model.named_parameters())
    rows = trained_rows(model)
    numbers = {n: len(rows[n]) * p[0].numel() for n, p in named if n in rows}
    return Summary(
        model=type(model).__name__,
        reports=tuple(records(model).values()),
        base=sum(p.numel() for p in base),
        inserted=sum(p.numel() for p in inserted.values()),
        stored=sum(t.numel() for t in plain_state(model).values()),
        trainable=sum(numbers.get(n, p.numel()) for n, p in named if p.requires_grad),
        kept=sum(
            numbers.get(n, p.numel()) for n, p in named if p.requires_grad and id(p) not in inserted
        ),
    )
