"""Splice methods into a model, remove them, and switch them off: all or nothing, in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from surgery import fastpath
from surgery.apply import apply_edit, require_applied
from surgery.assign import assign, left_out
from surgery.errors import SpliceError, suggest
from surgery.host import (
    Operation,
    capture_host,
    finish,
    hosts,
    install,
    is_host,
    signature,
    state_of,
    uninstall,
)
from surgery.locate import locate
from surgery.method import Method
from surgery.quiet import evaluating
from surgery.report import RECORD, Inserted, Report, records
from surgery.selection import Sites
from surgery.sites import Edit, Site
from surgery.variant import Variant
from surgery.verify import present_outputs, verify_reach, verify_start


def splice(
    model: nn.Module,
    methods: Method | Sequence[Method],
    at: Sites | Site | None = None,
    example_inputs: Any = None,
    name: str = "default",
) -> Report:
    """Splice methods into a model. It stays the object it is; either all is done or nothing.

    Args:
        model: any ``nn.Module``; it may be spliced already, under other names.
        methods: one method or a list; a later one sees each port as the earlier ones left it.
        at: where; by default every site that a method is for.
        example_inputs: as for :func:`surgery.locate`; not needed if ``at`` is given.
        name: of this splice, for ``remove``, ``disabled`` and ``save``.

    Returns:
        what was inserted where, and the start state as it was verified.

    Raises:
        SpliceError: the name is taken, or what was spliced does not do what its method declares.
        SiteError: a method is for none of the sites.
        PortError: a port is missing.
        CaptureError: a forward cannot be captured; the line is named.
    """
    chosen = (methods,) if isinstance(methods, Method) else tuple(methods)
    _check(model, chosen, name)
    if at is None:
        at = locate(model, example_inputs)
    sites = Sites([at]) if isinstance(at, Site) else at
    todo = assign(model, chosen, sites)
    report = Report(name, chosen)
    report.left_out = [f"{m.name} at {s.path}" for m in chosen for s in left_out(m, sites)]
    undo: list[Any] = []
    shared: dict[int, dict[str, nn.Module]] = {}  # by method: modules that its sites share
    try:
        with evaluating(model):
            for path, pairs in todo.items():
                _operate(model, path, pairs, report, shared, undo)
        _verify_starts(report)
    except BaseException:
        for step in reversed(undo):
            step()
        fastpath.reopen(model, is_host)
        raise
    vars(model).setdefault(RECORD, {})[name] = report
    return report


def _check(model: nn.Module, methods: tuple[Method, ...], name: str) -> None:
    for method in methods:
        if not isinstance(method, Method):
            raise SpliceError(
                f"{method!r} is not a method. Make one with surgery.method('lora', rank=8)."
            )
    if not methods:
        raise SpliceError("no method was given. Pass one, or a list of them.")
    if not name.isidentifier():
        raise SpliceError(f"name={name!r} must be an identifier: it becomes part of module names.")
    if name in records(model):
        free = next(f"{name}_{i}" for i in range(2, 99) if f"{name}_{i}" not in records(model))
        raise SpliceError(
            f"this {type(model).__name__} is already spliced under the name {name!r}. Pass "
            f"another, say name={free!r}, or surgery.remove(model, {name!r}) first."
        )


def _operate(
    model: nn.Module,
    path: str,
    pairs: list[tuple[Method, Site]],
    report: Report,
    common: dict[int, dict[str, nn.Module]],
    undo: list[Any],
) -> None:
    """Build, insert and verify one host; each change leaves its undoing in ``undo``."""
    module = model.get_submodule(path)
    plan = pairs[0][1].host
    assert plan is not None
    base = present_outputs(module, plan.args, plan.kwargs)
    known = state_of(module)
    through = plan.through if known is None else known.through
    captured, patterns = capture_host(module, path, through, plan.args, plan.kwargs)
    if known is not None:
        for earlier in (known.operations[n] for n in known.active):
            for edit, child in zip(earlier.edits, earlier.children, strict=True):
                apply_edit(patterns, edit, child, module)
    seen = {p.key: p.one_key for p in patterns}
    operation = Operation(report.name, [], [])
    new: list[tuple[str, nn.Module]] = []
    inserted: list[Inserted] = []
    shared: dict[int, nn.Parameter] = {}  # modules of one site may share
    for method, site in pairs:
        opened = site.open(model, common.setdefault(id(method), {}))
        method.splice(opened)
        if not opened.edits:
            raise SpliceError(f"method {method.name!r} at {path}: it inserted nothing.")
        for edit, child_module in opened.edits:
            child = _free_name(module, edit.child, report.name, [c for c, _ in new])
            ports = next((p.ports for p in patterns if p.key == edit.site), {})
            if edit.port in ports and (chosen := edit.columns_of(ports[edit.port])) is not None:
                index = torch.tensor(chosen, device=site.device)
                child_module.register_buffer("_columns", index, persistent=False)
            new.append((child, child_module))
            operation.edits.append(edit)
            operation.children.append(child)
            fresh = {id(p): p for p in child_module.parameters() if id(p) not in shared}
            shared.update(fresh)
            count = sum(p.numel() for p in fresh.values())
            full = f"{path}.{child}" if path else child
            inserted.append(Inserted(_lean(site), method, edit, full, count))

    undo.append(lambda: take_out(module, report.name, [c for c, _ in new]))
    state = install(module, plan)
    fastpath.close(model, path)
    for child, child_module in new:
        child_module.train(module.training)
        module.add_module(child, child_module)
    for edit, child in zip(operation.edits, operation.children, strict=True):
        require_applied(apply_edit(patterns, edit, child, module), edit, path)
    state.operations[report.name] = operation
    state.refresh()
    variant = finish(captured)
    key, _ = signature(plan.args, plan.kwargs, state.active)
    state.variants = {key: [variant]}
    try:
        report.change[path] = verify_start(module, variant, plan.args, plan.kwargs, base)
        heard = [
            c for e, c in zip(operation.edits, operation.children, strict=True) if _heard(e, seen)
        ]
        verify_reach(module, state, variant, heard, plan.args, plan.kwargs)
    except (RuntimeError, IndexError, ValueError) as error:
        names = ", ".join(m.name for m in report.methods)
        raise SpliceError(
            f"{path}: the forward fails with {names} spliced in ({type(error).__name__}: {error}). "
            "What the method inserts does not fit this site; leave it out with at=."
        ) from error
    report.inserted += inserted


def _heard(edit: Edit, one_key: dict[str, bool]) -> bool:
    """Can an edit be heard in the example? A softmax over one key is 1, whatever query and key."""
    return not one_key.get(edit.site) or edit.port not in ("query", "key")


def _lean(site: Site) -> Site:
    """The site without its example inputs, to be kept."""
    assert site.host is not None
    return dataclasses.replace(site, host=dataclasses.replace(site.host, args=(), kwargs={}))


def _free_name(module: nn.Module, child: str, name: str, taken: list[str]) -> str:
    """The name of an inserted child: ``lora_query``, with the splice's name unless default."""
    child = child if name == "default" else f"{name}_{child}"
    candidates = [child, *(f"{child}_{i}" for i in range(2, 99))]
    return next(c for c in candidates if c not in taken and not hasattr(module, c))


def _verify_starts(report: Report) -> None:
    wrong = {p: c for p, c in report.change.items() if c}
    if report.start == "exact" and wrong:
        path, change = max(wrong.items(), key=lambda item: item[1])
        raise SpliceError(
            f"methods {[m.name for m in report.methods]} declare start 'exact', but outputs of "
            f"{len(wrong)} hosts moved, by {change:.2g} at {path}. Zero-initialise what is added, "
            "or declare start 'none'."
        )


def take_out(module: nn.Module, name: str, children: list[str]) -> None:
    """Take inserted modules of one splice out of a host; without any it is no host any more."""
    for child in children:
        if child in module._modules:
            delattr(module, child)
    state = state_of(module)
    if state is None:
        return
    operation = state.operations.get(name, Operation(name, [], []))
    left = [(e, c) for e, c in zip(operation.edits, operation.children, strict=True)
            if c not in children]  # fmt: skip
    operation.edits, operation.children = [e for e, _ in left], [c for _, c in left]
    if not left:
        state.operations.pop(name, None)
        state.off -= {name}
    state.refresh()
    state.variants = {}
    if not state.operations:
        uninstall(module)


def remove(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take out one splice, or all: bit for bit the model that it was.

    What was trained of the base itself (see ``freeze_base``) stays as trained.

    Raises:
        SpliceError: nothing is spliced under that name.
    """
    names = list(records(model)) if name is None else [name]
    known(model, names)
    for host in list(hosts(model).values()):
        state = state_of(host)
        for each in names:
            if state is not None and each in state.operations:
                take_out(host, each, state.operations[each].children)
    for each in names:
        del records(model)[each]
    if not records(model):
        del vars(model)[RECORD]
    fastpath.reopen(model, is_host)
    return model


@contextmanager
def disabled(model: nn.Module, name: str | None = None) -> Iterator[nn.Module]:
    """Run the model without one splice, or without any, inside a ``with`` block."""
    names = frozenset(records(model)) if name is None else frozenset({name})
    known(model, list(names))
    states = [state for h in hosts(model).values() if (state := state_of(h))]
    before = [state.off for state in states]
    try:
        for state in states:
            state.off |= names
            state.refresh()
        yield model
    finally:
        for state, off in zip(states, before, strict=True):
            state.off = off
            state.refresh()


def known(model: nn.Module, names: list[str]) -> None:
    """Raise unless there are splices of these names."""
    there = list(records(model))
    for name in names or [""]:
        if name not in there:
            what = f"named {name!r} " if name else ""
            raise SpliceError(
                f"nothing {what}is spliced into this {type(model).__name__}. {suggest(name, there)}"
                f"Splices here: {', '.join(there) or 'none'}."
            )


def variants(model: nn.Module) -> dict[str, list[Variant]]:
    """The graphs that each host of a model has so far: print their ``code`` or ``graph``."""
    return {
        path: [v for group in state.variants.values() for v in group]
        for path, host in hosts(model).items()
        if (state := state_of(host)) is not None
    }
