"""The commonest jobs in one call each: splice a method into a model, and freeze the base.

    surgery.lora(model, rank=16)      low-rank updates of all projections of attention and FFN
    surgery.prefix(model)             virtual keys and values for every attention
    surgery.inducer(model)            inducer-tuning of every attention

Each is ``splice`` and ``freeze_base``; use these two for anything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from surgery.adapter.training import freeze_base
from surgery.errors import MethodError
from surgery.plugin import Method, Sites, method
from surgery.splicer import Report, remove, splice


def lora(
    model: nn.Module,
    rank: int = 8,
    targets: str | Sequence[str] = "all-linear",
    at: Sites | None = None,
    name: str = "default",
    keep: Sequence[str] = (),
    example_inputs: Any = None,
    **options: Any,
) -> Report:
    """Splice LoRA into a model, and freeze the rest.

    Args:
        model: any model; see :func:`surgery.splice`.
        rank: inner width.
        targets: ``"all-linear"``, every projection of attention and FFN; ``"attention"``, those of
            attention; or ports, such as ``("query", "value")``.
        at: the sites; by default every site with such a port.
        name: the name of the splice.
        keep: modules or parameters of the base that are trained along; see ``freeze_base``.
        example_inputs: as for :func:`surgery.locate`.
        **options: other options of the method, such as ``alpha=32`` or ``dropout=0.05``.

    Returns:
        the report of the splice. Print it.

    Raises:
        SurgeryError: as ``method``, ``splice`` and ``freeze_base`` do. Nothing has changed.

    Example:
        ``surgery.lora(model, rank=16, targets=("query", "value"))``
    """
    ports = _TARGETS.get(targets) if isinstance(targets, str) else tuple(targets)
    if ports is None:
        raise MethodError(
            f"targets={targets!r}: say {' or '.join(map(repr, _TARGETS))}, or give the names of "
            "ports, such as ('query', 'value')."
        )
    made = method("lora", rank=rank, ports=ports, **options)
    return _adapt(model, made, at, name, keep, example_inputs)


_TARGETS: dict[str, tuple[str, ...]] = {
    "all-linear": ("all",),
    "attention": ("query", "key", "value", "output"),
}


def prefix(
    model: nn.Module,
    length: int = 20,
    at: Sites | None = None,
    name: str = "default",
    keep: Sequence[str] = (),
    example_inputs: Any = None,
    **options: Any,
) -> Report:
    """Splice a prefix of ``length`` virtual keys into every attention, and freeze the rest.

    Arguments, result and errors are those of :func:`surgery.lora`.

    Example:
        ``surgery.prefix(base, length=4)``
    """
    made = method("prefix", length=length, **options)
    return _adapt(model, made, at, name, keep, example_inputs)


def inducer(
    model: nn.Module,
    key_rank: int = 10,
    value_rank: int = 15,
    at: Sites | None = None,
    name: str = "default",
    keep: Sequence[str] = (),
    example_inputs: Any = None,
    **options: Any,
) -> Report:
    """Splice an inducer, one virtual key that follows the query, into every attention; freeze.

    Arguments, result and errors are those of :func:`surgery.lora`.

    Example:
        ``surgery.inducer(model, key_rank=2, value_rank=2)``
    """
    made = method("inducer", key_rank=key_rank, value_rank=value_rank, **options)
    return _adapt(model, made, at, name, keep, example_inputs)


def _adapt(
    model: nn.Module, made: Method, at: Any, name: str, keep: Sequence[str], example_inputs: Any
) -> Report:  # fmt: skip
    """Splice a method and freeze the base, both or neither."""
    report: Report = splice(model, made, at=at, example_inputs=example_inputs, name=name)
    try:
        freeze_base(model, keep=keep)
    except BaseException:
        remove(model, name)
        raise
    return report
