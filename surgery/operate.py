"""Operate: what one splice does to one host, built, inserted and verified."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from surgery import fastpath
from surgery.apply import apply_edit, require_applied
from surgery.dropout import draw_by_name
from surgery.errors import SpliceError
from surgery.host import (
    HostState,
    Operation,
    capture_host,
    finish,
    install,
    run,
    signature,
    state_of,
    uninstall,
)
from surgery.method import Method
from surgery.pattern import Pattern
from surgery.report import Inserted, Report
from surgery.sites import CALLS, Edit, HostPlan, Site
from surgery.verify import (
    difference,
    outputs,
    present_outputs,
    verify_reach,
    verify_start,
    verify_wraps,
)


def operate(
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
    calls = [pair for pair in pairs if pair[1].kind in CALLS]
    if calls:
        inside = [pair for pair in pairs if pair not in calls]
        if inside:
            operate(model, path, inside, report, common, undo)
        _wrap(model, module, path, calls, report, common, undo)
        return
    base = present_outputs(module, plan.args, plan.kwargs)
    known = state_of(module)
    through = plan.through if known is None else known.through
    captured, patterns = capture_host(module, path, through, plan.args, plan.kwargs)
    if known is not None:
        for earlier in (known.operations[n] for n in known.active):
            for edit, child in zip(earlier.edits, earlier.children, strict=True):
                apply_edit(patterns, edit, child, module)
    seen = {p.key: p.one_key for p in patterns}
    operation, new, inserted = _build(model, module, path, pairs, report, common, patterns)
    undo.append(lambda: take_out(module, report.name, [c for c, _ in new]))
    state = _put_in(module, plan, operation, new)
    fastpath.close(model, path)
    for edit, child in zip(operation.edits, operation.children, strict=True):
        require_applied(apply_edit(patterns, edit, child, module), edit, path)
    variant = finish(captured)
    key, _ = signature(plan.args, plan.kwargs, state.active)
    state.variants = {key: [variant]}
    try:
        report.change[path] = verify_start(module, variant, plan.args, plan.kwargs, base)
        alone = [i for i in inserted if _heard(i.edit, seen) and not i.method.together]
        children = [i.path.rpartition(".")[2] for i in alone]
        verify_reach(module, state, variant, children, plan.args, plan.kwargs)
    except (RuntimeError, IndexError, ValueError) as error:
        names = ", ".join(m.name for m in report.methods)
        raise SpliceError(
            f"{path}: the forward fails with {names} spliced in ({type(error).__name__}: {error}). "
            "What the method inserts does not fit this site; leave it out with at=."
        ) from error
    report.inserted += inserted


def _wrap(
    model: nn.Module,
    module: nn.Module,
    path: str,
    pairs: list[tuple[Method, Site]],
    report: Report,
    common: dict[int, dict[str, nn.Module]],
    undo: list[Any],
) -> None:
    """The same for what goes around the call of a module."""
    plan = pairs[0][1].host
    assert plan is not None
    base = present_outputs(module, plan.args, plan.kwargs)
    operation, new, inserted = _build(model, module, path, pairs, report, common, [])
    undo.append(lambda: take_out(module, report.name, [c for c, _ in new]))
    state = _put_in(module, plan, operation, new)
    report.inserted += inserted
    if any(i.method.together for i in inserted):
        return

    def forward(*args: Any, **kwargs: Any) -> Any:
        return run(module, state, args, kwargs)

    report.change[path] = difference(base, outputs(module, forward, plan.args, plan.kwargs))
    verify_wraps(module, state, forward, operation.children, plan.args, plan.kwargs)


def _put_in(
    module: nn.Module, plan: HostPlan, operation: Operation, new: list[tuple[str, nn.Module]]
) -> HostState:
    """Make the module a host that has these children."""
    state = install(module, plan)
    for child, made in new:
        made.train(module.training)
        draw_by_name(made, f"{plan.path}.{child}")
        module.add_module(child, made)
    before = state.operations.get(operation.name, Operation(operation.name, [], []))
    edits, children = before.edits + operation.edits, before.children + operation.children
    state.operations[operation.name] = Operation(operation.name, edits, children)
    state.refresh()
    return state


def _build(
    model: nn.Module,
    module: nn.Module,
    path: str,
    pairs: list[tuple[Method, Site]],
    report: Report,
    common: dict[int, dict[str, nn.Module]],
    patterns: list[Pattern],
) -> tuple[Operation, list[tuple[str, nn.Module]], list[Inserted]]:
    """Let each method make its modules; nothing of the model changes."""
    operation = Operation(report.name, [], [])
    new: list[tuple[str, nn.Module]] = []
    inserted: list[Inserted] = []
    shared: dict[int, nn.Parameter] = {}  # modules of one site may share
    for method, site in pairs:
        opened = site.open(model, common.setdefault(id(method), {}))
        method.splice(opened)
        if not opened.edits:
            raise SpliceError(f"method {method.name!r} at {path}: it inserted nothing.")
        for edit, made in opened.edits:
            child = _free_name(module, edit.child, report.name, [c for c, _ in new])
            ports = next((p.ports for p in patterns if p.key == edit.site), {})
            if edit.port in ports and (chosen := edit.columns_of(ports[edit.port])) is not None:
                index = torch.tensor(chosen, device=site.device)
                made.register_buffer("_columns", index, persistent=False)
            new.append((child, made))
            operation.edits.append(edit)
            operation.children.append(child)
            fresh = {id(p): p for p in made.parameters() if id(p) not in shared}
            shared.update(fresh)
            count = sum(p.numel() for p in fresh.values())
            full = f"{path}.{child}" if path else child
            inserted.append(Inserted(_lean(site), method, edit, full, count))
    return operation, new, inserted


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
