"""Operate: what one splice does to one host, built, inserted and verified."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from surgery import fastpath
from surgery.apply import apply_edit, require_applied
from surgery.dropout import draw_by_name
from surgery.errors import SpliceError, SurgeryError
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
    if not plan.args and not plan.kwargs:
        raise SpliceError(
            f"{path}: this site has no example of a call any more, as sites of a report have none. "
            "Take it from surgery.locate(model)."
        )
    calls = [pair for pair in pairs if pair[1].kind in CALLS]
    if calls:
        inside = [pair for pair in pairs if pair not in calls]
        if inside:
            operate(model, path, inside, report, common, undo)
        _wrap(model, module, path, calls, report, common, undo)
        return
    base = present_outputs(module, plan.args, plan.kwargs)
    known = state_of(module)
    if known is not None and not known.edited and not known.through >= plan.through:
        before = known.through  # it was made for what goes around its call
        undo.append(lambda: setattr(known, "through", before))
        known.through |= plan.through
    through = plan.through if known is None else known.through
    captured, patterns = capture_host(module, path, through, plan.args, plan.kwargs)
    if known is not None:
        for earlier in (known.operations[n] for n in known.active):
            for edit, child in zip(earlier.edits, earlier.children, strict=True):
                apply_edit(patterns, edit, child, module)
    one_key = {(p.kind, p.key) for p in patterns if p.one_key}
    operation, new, inserted = _build(model, module, path, pairs, report, common)
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
        alone = [i for i in inserted if _heard(i.edit, one_key) and not i.method.together]
        children = [i.path.rpartition(".")[2] for i in alone]
        verify_reach(module, state, variant, children, plan.args, plan.kwargs)
    except SurgeryError:
        raise
    except Exception as error:  # whatever the code of a plugin raises
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
    operation, new, inserted = _build(model, module, path, pairs, report, common)
    undo.append(lambda: take_out(module, report.name, [c for c, _ in new]))
    state = _put_in(module, plan, operation, new)
    report.inserted += inserted
    if any(i.method.together for i in inserted):
        return

    def forward(*args: Any, **kwargs: Any) -> Any:
        return run(module, state, args, kwargs)

    change = difference(base, outputs(module, forward, plan.args, plan.kwargs))
    within = report.change.get(path, 0.0)  # of what was put inside the same host
    report.change[path] = None if change is None or within is None else max(change, within)
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
            new.append((child, made))
            operation.edits.append(edit)
            operation.children.append(child)
            fresh = {id(p): p for p in made.parameters() if id(p) not in shared}
            shared.update(fresh)
            count = sum(p.numel() for p in fresh.values())
            full = f"{path}.{child}" if path else child
            inserted.append(Inserted(_lean(site), method, edit, full, count))
    return operation, new, inserted


def _heard(edit: Edit, one_key: set[tuple[str, str]]) -> bool:
    """Can an edit be heard in the example? A softmax over one key is 1, whatever query and key."""
    return (edit.kind, edit.site) not in one_key or edit.port not in ("query", "key")


def _lean(site: Site) -> Site:
    """The site without its example inputs, to be kept."""
    assert site.host is not None
    host = dataclasses.replace(site.host, args=(), kwargs={})
    call = {name: x for name, x in site.call.items() if not isinstance(x, Tensor)}
    lean = dataclasses.replace(site, host=host, call=call, ports={})
    lean.ports.update({n: dataclasses.replace(p, site=lean) for n, p in site.ports.items()})
    return lean


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
