"""Splice methods into a model, remove them, and switch them off: all or nothing, in place.

splice(model, methods, at)
  check_declared, names             refuse before anything is touched
  locate, unless ``at`` is given    one run of the model shows its sites
  assign                            each method to the sites it chooses; method.check(sites)
  operate, host by host             method.splice(site), insert, verify
  verify_together, _verify_starts   outputs as declared
  divide                            where a tensor-parallel plan has divided the model
  commit                            on any exception the model is put back (all_or_nothing.py)
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from surgery.errors import SpliceError
from surgery.host import ALL_ON, Variant, chosen, hosts, is_host, state_of
from surgery.interop import (
    deliver,
    differentiable,
    encoder_fastpath,
    evaluating,
    explained_out_of_reach,
    huggingface,
    keep_unpacked,
    outside_inference_mode,
    require_unpacked,
    shard_like,
)
from surgery.locator import locate
from surgery.plugin import Method, Site, Sites, method, settle_advance
from surgery.splicer.activation import require_spliced
from surgery.splicer.all_or_nothing import Before, atomically
from surgery.splicer.assignment import assign, left_out, without_attention
from surgery.splicer.division import divide
from surgery.splicer.division_trial import Todo
from surgery.splicer.insertion import operate, take_out
from surgery.splicer.record import (
    Report,
    drop_record,
    forget_rows,
    look_up,
    reports,
    require_free,
    spliced_model,
    tell_of_calls,
)
from surgery.splicer.references import give_references
from surgery.splicer.transaction import Transaction
from surgery.splicer.verification import verify_together


@outside_inference_mode
def splice(
    model: nn.Module,
    methods: Method | str | Sequence[Method | str],
    at: Sites | Site | Sequence[Site] | None = None,
    example_inputs: Any = None,
    name: str = "default",
) -> Report:
    """Splice methods into a model. The model stays the object it is; all is done or nothing.

    Args:
        model: any ``nn.Module``; it may have other splices, under other names.
        methods: one method or a list; a later method sees each port as the earlier ones left it,
            the lse of virtual tokens included. A name stands for that method with its defaults.
        at: the sites; by default every site that a method suits.
        example_inputs: as for :func:`surgery.locate`; not needed if ``at`` is given.
        name: the name of this splice, for ``remove``, ``disabled`` and ``save``.

    Returns:
        a report of what was inserted where, with the verified start state. Print it.

    Raises:
        SpliceError: the name is taken, or a method does not do what it declares.
        SiteError: a method suits none of the sites.
        PortError: a port is missing.
        CaptureError: a forward cannot be captured; the message names the line.

    Example:
        ``surgery.splice(model, surgery.method("lora", rank=8), at=sites.attention)``
    """

    given = _made(methods)

    def operate_on(_: Before) -> Report:
        report: Report
        report, todo = _splice(model, given, at, example_inputs, name)
        divide(model, report, todo)
        return report

    report = atomically(model, operate_on)
    shard_like(model, [model.get_submodule(i.path) for i in report.inserted])
    give_references()
    return report


@explained_out_of_reach
def _splice(
    model: nn.Module, given: tuple[Method, ...], at: Any, example_inputs: Any, name: str
) -> tuple[Report, Todo]:
    """Do what :func:`splice` says, in a model whose parameters are whole; return what was done."""
    _check(model, given, name)
    _check_below(model, name)
    notes: list[str] = []
    if at is None:
        at = locate(model, example_inputs)
        given, at, notes = without_attention(given, at)
    sites = at if isinstance(at, Sites) else Sites([at] if isinstance(at, Site) else list(at))
    todo = assign(model, given, sites)
    report = Report(name, given, order=[s.identity for s in [*sites, *sites.others]])
    report.notes, report.overlooked = notes, sites.overlooked
    report.left_out = [line for method in given for line in left_out(method, sites)]
    trunks = [site.path for site in sites.others if site.kind == "trunk"]
    transaction = Transaction(model, report, todo, trunk=bool(trunks))
    all_on = chosen(ALL_ON, look_up(model).switches)  # what this thread has off is there, too
    with evaluating(model), differentiable(model), all_on:
        for path, pairs in todo.items():
            deliver()
            operate(transaction, path, pairs)
        verify_together(model, report, sites.others)
    _verify_starts(report, trunks)
    for i in report.inserted:  # in training, if their hosts are
        model.get_submodule(i.path).train(model.get_submodule(i.site.path).training)
    report = transaction.commit()
    _warn_of_untrained(report)
    return report, todo


def _warn_of_untrained(report: Report) -> None:
    """Warn of sites at which nothing can be trained: the splice is right, and does nothing new."""
    reasons = {site.path: site.untrained for site in report.sites if site.untrained}
    if reasons:
        path, reason = next(iter(reasons.items()))
        warnings.warn(
            f"what is inserted at {len(reasons)} of {len({s.path for s in report.sites})} places "
            f"will get no gradient: {path}: {reason}. Leave these sites out with at=, or change "
            "how the model runs them.",
            stacklevel=6,
        )


def _made(methods: Any) -> tuple[Any, ...]:
    """Return the methods as a tuple, those that were given by name made with their defaults."""
    several = isinstance(methods, Iterable) and not isinstance(methods, (str, type))
    given = tuple(methods) if several else (methods,)
    return tuple(method(each) if isinstance(each, str) else each for each in given)


def _check(model: nn.Module, methods: tuple[Method, ...], name: str) -> None:
    """Raise unless these are methods that declare themselves properly, and the name is free."""
    for each in methods:
        if isinstance(each, type) and issubclass(each, Method):
            raise SpliceError(
                f"{each.__name__} is a class, not a method with its options. Pass an object of "
                f"it: {each.__name__}(), or {each.name!r}. Nothing has changed."
            )
        if not isinstance(each, Method):
            raise SpliceError(
                f"{each!r} is not a method. Make one with surgery.method('lora', rank=8)."
            )
        each.check_declared()
    if not methods:
        raise SpliceError("no method was given. Pass one, or a list of them.")
    require_free(model, name)
    require_unpacked(model)


def _check_below(model: nn.Module, name: str) -> None:
    """Raise if a part of the model has a splice that is not in the model's record."""
    for path, host in hosts(model).items():
        state = state_of(host)
        unknown = [n for n in state.operations if n not in reports(model)] if state else []
        if unknown:
            raise SpliceError(
                f"{path or 'the model'} is already spliced under the name {unknown[0]!r}, by "
                "itself or as part of another model, so this one would neither train nor save it. "
                "Splice into the same model as before, or surgery.remove that one from it first."
            )


def _verify_starts(report: Report, trunks: Sequence[str]) -> None:
    """Raise if a host's output moved although every method there declares that it does not."""
    moving = [i for i in report.inserted if i.method.start == "none"]
    free = {i.site.path for i in moving}
    free |= set(trunks) if any(i.method.together for i in moving) else set()
    wrong = {p: c for p, c in report.change.items() if c and p not in free}
    if wrong:
        path, change = max(wrong.items(), key=lambda item: item[1])
        methods = {i.method.name: i.method.start for i in report.inserted if i.site.path == path}
        declared = " and ".join(f"{name!r} declares start {s!r}" for name, s in methods.items())
        raise SpliceError(
            f"{declared}, but outputs of {len(wrong)} hosts moved, by {change:.2g} at {path}. "
            "Zero-initialise what is added, or declare start 'none'."
        )


@outside_inference_mode
def remove(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take out one splice, or all; the model is bit for bit what it was.

    Parameters of the base that were trained along (see ``freeze_base``) stay as trained.

    Raises:
        SpliceError: nothing is spliced under that name.

    Example:
        ``surgery.remove(model, "first")``, or ``surgery.remove(model)`` for all
    """
    whole = spliced_model(model)
    require_spliced(whole, *([] if name is None else [name]))
    names = list(reports(whole)) if name is None else [name]
    atomically(whole, lambda _: _remove(whole, names))
    return model


def _remove(model: nn.Module, names: list[str]) -> None:
    """Take out these splices."""
    for host in list(hosts(model).values()):
        state = state_of(host)
        for each in names:
            if state is not None and each in state.operations:
                take_out(host, each, state.operations[each].children)
    for each in names:
        del reports(model)[each]
    _settle(model)


def forget(model: nn.Module, report: Report, folded: set[str]) -> None:
    """Take folded modules out of their hosts and out of the record."""
    gone = [i for i in report.inserted if i.path in folded]
    for host in {i.site.path for i in gone}:
        children = [i.path.rpartition(".")[2] for i in gone if i.site.path == host]
        take_out(model.get_submodule(host), report.name, children)
    left = [i for i in report.inserted if i.path not in folded]
    reports(model)[report.name] = dataclasses.replace(report, inserted=left, merged=True)
    if not left:
        del reports(model)[report.name]
    _settle(model)


def _settle(model: nn.Module) -> None:
    """Put back what splicing changed outside hosts, wherever no splice needs it any more."""
    settle_advance(model)
    tell_of_calls(model)
    look_up(model).settle()
    closed = look_up(model).closed
    closed -= encoder_fastpath.reopen(model, closed, is_host)
    if not reports(model):
        huggingface.let_train(model, adapted=False)
        keep_unpacked(model, adapted=False)
        forget_rows(model)
        drop_record(model)


def refresh(model: nn.Module) -> nn.Module:
    """Drop every graph; each host captures its forward again at its next call.

    Hosts notice what has changed in the state that their forwards read, so this is needed only
    after a change that Python cannot show, such as one inside a C extension.

    Example:
        ``surgery.refresh(model)``
    """
    for host in hosts(model).values():
        state = state_of(host)
        if state is not None:
            state.refresh()
    return model


def variants(model: nn.Module) -> dict[str, list[Variant]]:
    """Return the graphs that each host has so far; print their ``code`` or ``graph``.

    Example:
        ``print(surgery.variants(model)[site.path][0].code)``
    """
    return {
        path: [v for s in state.every_selection() for v in s.variants()]
        for path, host in hosts(model).items()
        if (state := state_of(host)) is not None
    }
