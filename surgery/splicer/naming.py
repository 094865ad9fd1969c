"""Copy a splice under another name, and give one another name.

    copy      deep copies of the inserted modules, beside the first ones; switched off and frozen
    rename    the same modules under another name

Both leave what the model computes as it is.
"""

from __future__ import annotations

import copy as copying
import dataclasses
from typing import Any

from torch import nn

from surgery.errors import SpliceError
from surgery.host import Choice, HostState, Operation, state_of
from surgery.interop import outside_inference_mode, require_no_engine
from surgery.plugin import Method
from surgery.splicer.activation import require_spliced
from surgery.splicer.all_or_nothing import atomically
from surgery.splicer.insertion import free_name
from surgery.splicer.record import Inserted, Report, look_up, reports, require_free, spliced_model


@outside_inference_mode
def copy(model: nn.Module, name: str, new: str) -> Report:
    """Copy a splice: the same modules with the same values, at the same places, under a new name.

    The copy is switched off, and its parameters are frozen: the model computes what it did. It
    serves as the reference of preference training, say, or as the start of another adapter.

    Returns:
        the report of the copy.

    Raises:
        SpliceError: nothing is spliced in under ``name``, ``new`` is taken, or the splice is partly
            merged.

    Example:
        ``surgery.copy(model, "policy", "reference")``; then, for its outputs,
        ``with surgery.using(model, "reference"): ...``
    """
    whole = spliced_model(model)
    require_spliced(whole, name)
    require_free(whole, new)
    require_no_engine(whole, "copy")
    if reports(whole)[name].merged:
        raise SpliceError(
            f"splice {name!r} is partly merged into the base, and a copy would lack that part. "
            "Copy before merging."
        )
    return atomically(whole, lambda _: _copy(whole, name, new))


def _copy(model: nn.Module, name: str, new: str) -> Report:
    source = reports(model)[name]
    made = copies([model.get_submodule(i.path) for i in source.inserted], model)
    return add_beside(model, source, new, made, tuple(map(copying.copy, source.methods)))


def add_beside(
    model: nn.Module,
    source: Report,
    new: str,
    modules: list[nn.Module],
    methods: tuple[Method, ...],
) -> Report:
    """Add a splice with these modules where another one has its own; switched off and frozen.

    Args:
        modules, methods: one for each of ``source.inserted`` and of ``source.methods``.
    """
    made = {id(old): method for old, method in zip(source.methods, methods, strict=True)}
    inserted = [
        dataclasses.replace(
            i, path=_add(model, i, module.requires_grad_(False), new), method=made[id(i.method)]
        )
        for i, module in zip(source.inserted, modules, strict=True)
    ]
    record = look_up(model)
    before = record.switches.default
    on = record.switches.names if before.on is None else before.on
    report = dataclasses.replace(source, name=new, inserted=inserted, methods=methods)
    record.reports[new] = report
    record.settle()
    record.switches.default = Choice(on, before.shares)  # no host shows it to any thread
    for path in {i.site.path for i in inserted}:
        _state(model, path).refresh()
    return report


def copies(modules: list[nn.Module], model: nn.Module) -> list[nn.Module]:
    """Return deep copies of inserted modules; what they refer to outside of them is no copy."""
    own = {id(part) for m in modules for part in (*m.modules(), *m.parameters(), *m.buffers())}
    others: list[Any] = [*model.modules(), *model.parameters(), *model.buffers()]
    memo = {id(each): each for each in others if id(each) not in own}
    return [copying.deepcopy(module, memo) for module in modules]


def _add(model: nn.Module, source: Inserted, module: nn.Module, name: str) -> str:
    """Add a copy of an inserted module to the host of the first one; return its path."""
    path = source.site.path
    host, state = model.get_submodule(path), _state(model, path)
    child = free_name(host, f"{source.method.name}_{source.edit.port}", name, [])
    host.add_module(child, module)
    operation = state.operations.setdefault(name, Operation(name, [], []))
    operation.edits.append(source.edit)
    operation.children.append(child)
    return f"{path}.{child}" if path else child


def _state(model: nn.Module, path: str) -> HostState:
    state = state_of(model.get_submodule(path))
    assert state is not None  # something is spliced into it
    return state


@outside_inference_mode
def rename(model: nn.Module, name: str, new: str) -> nn.Module:
    """Give a splice another name, in the same place of their order. Its modules stay.

    Returns:
        the model.

    Raises:
        SpliceError: nothing is spliced in under ``name``, or ``new`` is taken.

    Example:
        ``surgery.rename(model, "first", "style")``
    """
    whole = spliced_model(model)
    require_spliced(whole, name)
    require_free(whole, new)
    atomically(whole, lambda _: _rename(whole, name, new))
    return model


def _rename(model: nn.Module, name: str, new: str) -> None:
    record = look_up(model)
    report = dataclasses.replace(record.reports[name], name=new)
    paths = {i.site.path for i in report.inserted}
    _put_under(record.reports, name, new, report)
    for path in paths:
        state = _state(model, path)
        operation = dataclasses.replace(state.operations[name], name=new)
        _put_under(state.operations, name, new, operation)
    default = record.switches.default
    record.settle()
    if default.on is not None:
        on = frozenset(new if each == name else each for each in default.on)
        shares = {new if n == name else n: share for n, share in default.shares.items()}
        record.switches.default = Choice(on, shares)
    for path in paths:
        _state(model, path).refresh()


def _put_under(items: dict[str, Any], name: str, new: str, value: Any) -> None:
    """Put a value in the place of the one under ``name``, under a new name."""
    every = [(new, value) if key == name else (key, item) for key, item in items.items()]
    items.clear()
    items.update(every)
