"""Build, insert and verify what one splice does to one host.

    for each host:
      for each method and site:  opened(site) -> method.splice(open site) -> edits
      insert the modules as children; make the module a host
      capture the host's graph; apply earlier edits, then these
      verify the start and that gradients reach every parameter

Sites that wrap a call (trunk, stack, block) come last and need no graph. A step that fails raises;
the model is then put back as it was (splicer/all_or_nothing.py).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from surgery.errors import ForwardError, RefusedError, SpliceError
from surgery.host import (
    HostState,
    Operation,
    Variant,
    capture_host,
    install,
    run,
    signature,
    state_of,
    uninstall,
)
from surgery.patterns import Match, weights_in
from surgery.plugin import CALLS, Edit, HostPlan, Method, Site, draw_by_name
from surgery.rewrite import (
    apply_edit,
    dtype_reads,
    lead_caches,
    port_values,
    require_applied,
    share_products,
)
from surgery.splicer.late_division import LateDivision
from surgery.splicer.outputs import Result, checked, difference, outputs, present_outputs
from surgery.splicer.record import Inserted, Report, record_of
from surgery.splicer.transaction import Transaction
from surgery.splicer.verification import verify_reach, verify_start, verify_wraps


def operate(transaction: Transaction, path: str, pairs: list[tuple[Method, Site]]) -> None:
    """Build, insert and verify one host."""
    module = transaction.model.get_submodule(path)
    for _, site in pairs:
        if site.host is None or not (site.host.args or site.host.kwargs):
            raise SpliceError(
                f"{path}: this site holds no example of a call, as sites of a report do not. "
                "Take the site from surgery.locate(model)."
            )
    pairs = sorted(pairs, key=lambda pair: pair[1].kind in CALLS)
    made = [edit for pair in pairs for edit in _edits(transaction, path, *pair)]
    inside = [each for each in made if each.edit.verb != "wrap"]
    around = [each for each in made if each.edit.verb == "wrap"]
    for act, group in ((_rewrite, inside), (_wrap, around)):
        if group:
            assert group[0].site.host is not None
            act(transaction, module, group[0].site.host, group)


@dataclass(frozen=True)
class _New:
    """One edit that a method makes, and the module that it inserts."""

    method: Method
    site: Site
    edit: Edit
    module: nn.Module


def _edits(transaction: Transaction, path: str, method: Method, site: Site) -> list[_New]:
    """Call ``splice`` of a method with one site."""
    site_now = transaction.opened(method, site)
    with _named(f"{path}: method {method.name!r} fails in its splice(site)"):
        method.splice(site_now)
    if not site_now.edits:
        raise SpliceError(
            f"method {method.name!r} at {path}: splice(site) inserted nothing. Edit a port in it."
        )
    return [_New(method, site, edit, new) for edit, new in site_now.edits]


def _rewrite(transaction: Transaction, module: nn.Module, plan: HostPlan, made: list[_New]) -> None:
    """Insert modules into the graph of a host."""
    path, report = plan.path, transaction.report
    base = present_outputs(module, plan.args, plan.kwargs, around=False)
    known = state_of(module)
    if known is not None and not known.all_on().edited and not known.through >= plan.through:
        known.through |= plan.through  # so far only its call was wrapped
    through = plan.through if known is None else known.through
    captured, matches = capture_host(module, path, through, plan.args, plan.kwargs)
    if known is not None:
        for edit, child in known.all_on().edits:
            apply_edit(matches, edit, child, module)
    one_key = {(p.kind, p.key) for p in matches if p.one_key}
    state, inserted = _insert(transaction, module, plan, made)
    state.weights |= {(i.edit.kind, i.edit.site): _weights(matches, i.edit) for i in inserted}
    transaction.close_fused_path(path)
    results: list[Result] = []
    for i in inserted:
        results.append(Result(_child(i), i.edit, port_values(matches, i.edit)))
        require_applied(apply_edit(matches, i.edit, _child(i), module), i.edit, path)
    lead_caches(captured.graph, module)
    share_products(captured.graph, module)
    for _, child in state.all_on().edits:
        captured.reads += dtype_reads(module.get_submodule(child))
    variant = Variant(captured)
    key, _ = signature(plan.args, plan.kwargs, state.all_on().names)
    state.all_on().add(variant, key)
    with _named(_failing(path, report)):
        with checked(module, path, results):
            report.change[path] = verify_start(module, variant, plan.args, plan.kwargs, base)
        alone = [
            i
            for i in inserted
            if i.method.learns and _shows_in_example(i.edit, one_key) and not transaction.waits(i)
        ]
        others = transaction.referred(inserted)
        children = list(map(_child, alone))
        verify_reach(module, state, variant, children, others, plan.args, plan.kwargs)


def _wrap(transaction: Transaction, module: nn.Module, plan: HostPlan, made: list[_New]) -> None:
    """Insert modules around the call of a host."""
    base = present_outputs(module, plan.args, plan.kwargs)
    state, inserted = _insert(transaction, module, plan, made)
    if any(map(transaction.waits, inserted)):
        return

    def forward(*args: Any, **kwargs: Any) -> Any:
        return run(module, state, args, kwargs)

    learning = [i for i in inserted if i.method.learns]
    children, others = list(map(_child, learning)), transaction.referred(inserted)
    changes = transaction.report.change
    with _named(_failing(plan.path, transaction.report)):
        change = difference(base, outputs(module, forward, plan.args, plan.kwargs))
        within = changes.get(plan.path, 0.0)  # change by edits inside the same host
        changes[plan.path] = None if change is None or within is None else max(change, within)
        verify_wraps(module, state, forward, children, others, plan.args, plan.kwargs)


def _insert(
    transaction: Transaction, module: nn.Module, plan: HostPlan, made: list[_New]
) -> tuple[HostState, list[Inserted]]:
    """Make ``module`` a host with the new modules as children."""
    name = transaction.report.name
    children: list[str] = []
    inserted: list[Inserted] = []
    seen: set[int] = set()  # modules of one site may share parameters
    for each in made:
        child, new = free_name(module, each.edit.child, name, children), each.module
        children.append(child)
        fresh = {id(p): p for p in new.parameters() if id(p) not in seen}
        seen.update(fresh)
        count = sum(p.numel() for p in fresh.values())
        full = f"{plan.path}.{child}" if plan.path else child
        frozen = tuple(n for n, p in new.named_parameters() if not p.requires_grad)
        inserted.append(Inserted(_lean(each.site), each.method, each.edit, full, count, frozen))
    state = install(module, plan)
    state.switches = record_of(transaction.model).switches
    state.divide = LateDivision(transaction.model)
    transaction.try_out(state)
    for child, new in zip(children, (each.module for each in made), strict=True):
        new.train(module.training)
        draw_by_name(new, f"{plan.path}.{child}")
        module.add_module(child, new)
    before = state.operations.get(name, Operation(name, [], []))
    edits = before.edits + [i.edit for i in inserted]
    state.operations[name] = Operation(name, edits, before.children + children)
    state.refresh()
    transaction.report.inserted += inserted
    return state, inserted


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Turn any error of a plugin's code into a SpliceError that says what failed."""
    try:
        yield
    except RefusedError:
        raise
    except ForwardError as error:  # the forward of a trial: the splice is undone
        raise SpliceError(f"{what}: {error}") from error
    except Exception as error:
        raise SpliceError(
            f"{what} ({type(error).__name__}: {error}). What the method inserts does not fit this "
            "site; mend it, or leave the site out with at=."
        ) from error


def _failing(path: str, report: Report) -> str:
    """Say that the forward of a host fails with these methods."""
    return f"{path}: the forward fails with {', '.join(m.name for m in report.methods)} spliced in"


def _child(inserted: Inserted) -> str:
    """Return the name of an inserted module among the children of its host."""
    return inserted.path.rpartition(".")[2]


def _shows_in_example(edit: Edit, one_key: set[tuple[str, str]]) -> bool:
    """Whether the example can show this edit's effect.

    With a single key the softmax is 1 whatever the query and key are.
    """
    return (edit.kind, edit.site) not in one_key or edit.port not in ("query", "key")


def _weights(matches: list[Match], edit: Edit) -> frozenset[str]:
    """Return the modules and parameters that an edit's site runs with."""
    return weights_in(n for m in matches if m.is_site(edit.kind, edit.site) for n in m.nodes)


def _lean(site: Site) -> Site:
    """Return the site without its example inputs, for the report."""
    assert site.host is not None
    host = dataclasses.replace(site.host, args=(), kwargs={})
    call = {name: x for name, x in site.call.items() if not isinstance(x, Tensor)}
    return dataclasses.replace(site, host=host, call=call)


def free_name(module: nn.Module, child: str, name: str, taken: list[str]) -> str:
    """Return a free child name: ``lora_query``, or ``NAME_lora_query`` for a named splice."""
    child = child if name == "default" else f"{name.replace('-', '_')}_{child}"
    candidates = itertools.chain([child], (f"{child}_{i}" for i in itertools.count(2)))
    return next(c for c in candidates if c not in taken and not hasattr(module, c))


def take_out(module: nn.Module, name: str, children: list[str]) -> None:
    """Take inserted modules of one splice out of a host; uninstall a host that has none left."""
    state = state_of(module)
    if state is None:
        return
    for selection in state.every_selection() if state.trial is None else ():
        selection.retire(module)
    operation = state.operations.get(name, Operation(name, [], []))
    left = [(e, c) for e, c in zip(operation.edits, operation.children, strict=True)
            if c not in children]  # fmt: skip
    operation.edits, operation.children = [e for e, _ in left], [c for _, c in left]
    if not left:
        state.operations.pop(name, None)
    state.refresh()
    for child in children:
        if child in module._modules:
            delattr(module, child)
    if not state.operations:
        uninstall(module)
