"""Count the sites, methods and parameters of a spliced model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from surgery.adapter.parameters import full_state, plain_state, spliced_parameters
from surgery.adapter.row_training import trained_rows
from surgery.interop import is_partitioned, numbers_in
from surgery.plugin import Method, html_table
from surgery.rewrite import Rows
from surgery.splicer import Report, look_up, reports, spliced_model


@dataclass(frozen=True)
class Summary:
    """Sites, methods and parameter counts of a spliced model. Print it, or its ``line``.

    All counts are counts of numbers. A parameter of which single rows are trained
    (``surgery.train_rows``) counts as trainable with those rows alone.

    Attributes:
        model: the name of the model's class.
        reports: the splices, in order.
        base, inserted: parameters of the base, and inserted ones.
        stored: numbers that ``surgery.save`` stores of the inserted modules.
        trainable: parameters that require a gradient now.
        kept: parameters of the base among the trainable ones.
        dtypes: those of inserted parameters, and those of the base.
        states: for each splice whether it is on in this context, trained, and partly merged.

    Example:
        >>> print(surgery.summary(model).line)
        trainable ... of ... parameters (... %)
    """

    model: str
    reports: tuple[Report, ...]
    base: int
    inserted: int
    stored: int
    trainable: int
    kept: int
    dtypes: tuple[tuple[torch.dtype, ...], tuple[torch.dtype, ...]]
    states: dict[str, str]

    @property
    def total(self) -> int:
        """All parameters: the base's and the inserted ones."""
        return self.base + self.inserted

    @property
    def percent(self) -> float:
        """Inserted parameters in per cent of the base's, as papers give it."""
        return 100 * self.inserted / self.base

    @property
    def line(self) -> str:
        """What is trained, in one line, as PEFT's ``print_trainable_parameters`` shows it."""
        percent = 100 * self.trainable / self.total
        return f"trainable {self.trainable:,} of {self.total:,} parameters ({percent:.4f} %)"

    def __repr__(self) -> str:
        lines = [self.model]
        for report in self.reports:
            lines.append(f"  {report.name}: {self.states[report.name]}; start {report.start}")
            for method, places, count in _used(report):
                lines.append(f"    {method}\n      at {places}, {count:,} parameters")
        if self.dtypes[0] and self.dtypes[0] != self.dtypes[1]:
            inner, outer = (" and ".join(str(d)[6:] for d in each) for each in self.dtypes)
            lines.append(f"  inserted parameters are {inner}, the base is {outer}")
        if self.stored != self.inserted:
            share = 100 * self.stored / self.base
            lines.append(f"  stored    {self.stored:>14,}  {share:.4f} % of the base's")
        lines += [
            f"  inserted  {self.inserted:>14,}  {self.percent:.4f} % of the base's {self.base:,}",
            f"  trainable {self.trainable:>14,}  {100 * self.trainable / self.total:.4f} % of all "
            f"{self.total:,}" + (f", {self.kept:,} of them the base's own" if self.kept else ""),
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [
            (report.name, self.states[report.name], method, places, f"{count:,}")
            for report in self.reports
            for method, places, count in _used(report)
        ]
        columns = ("splice", "state", "method", "places", "parameters")
        return html_table(self.model, columns, rows, [self.line])


def _used(report: Report) -> Iterator[tuple[Method, str, int]]:
    """Yield each method of a splice, where it is, and how many parameters it has."""
    for method in report.methods:
        own = [i for i in report.inserted if i.method is method]
        sites = {i.site.identity for i in own}
        kinds = sorted({i.site.description for i in own})
        places = f"{len(sites)} sites ({', '.join(kinds)}), {len(own)} modules"
        yield method, places, sum(i.parameters for i in own)


def summary(model: nn.Module) -> Summary:
    """Return the sites, methods, trainable and total parameters of a model.

    Example:
        ``print(surgery.summary(model))``
    """
    model = spliced_model(model)
    inserted = {id(p): p for _, p in spliced_parameters(model)}
    base = [p for p in model.parameters() if id(p) not in inserted]
    named = list(model.named_parameters())
    rows = trained_rows(model)
    numbers = {n: len(rows[n]) * p[0].numel() for n, p in named if n in rows}
    apart = any(map(is_partitioned, inserted.values()))
    stored = full_state(model) if apart else plain_state(model)
    return Summary(
        model=type(model).__name__,
        reports=tuple(reports(model).values()),
        base=sum(map(numbers_in, base)),
        inserted=sum(map(numbers_in, inserted.values())),
        stored=sum(map(numbers_in, stored.values())),
        states={name: _state(model, name) for name in reports(model)},
        dtypes=(_dtypes(inserted.values()), _dtypes(base)),
        trainable=sum(numbers.get(n, numbers_in(p)) for n, p in named if p.requires_grad),
        kept=sum(
            numbers.get(n, numbers_in(p))
            for n, p in named
            if p.requires_grad and id(p) not in inserted
        ),
    )


def _state(model: nn.Module, name: str) -> str:
    """Say whether a splice is on in this context, trained, partly merged, and in which dtype."""
    choice = look_up(model).switches.now()
    share = choice.shares.get(name, 1)
    on = "off" if not choice.has(name) else "on" if share == 1 else f"on at {share}"
    if isinstance(share, Rows):
        on = f"on in {len(share.entries)} of {share.of} rows"
    parameters = [p for _, p in spliced_parameters(model, name)]
    trained = "trained" if any(p.requires_grad for p in parameters) else "frozen"
    parts = [on, trained, *(str(dtype)[6:] for dtype in _dtypes(parameters))]
    return ", ".join([*parts, *(["partly merged"] if reports(model)[name].merged else [])])


def _dtypes(parameters: Iterable[torch.Tensor]) -> tuple[torch.dtype, ...]:
    """Return the floating-point dtypes among parameters, in order of appearance."""
    return tuple(dict.fromkeys(p.dtype for p in parameters if p.is_floating_point()))
