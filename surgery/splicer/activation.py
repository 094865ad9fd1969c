"""Choose which splices of a model run, and how far: for every thread, or inside a ``with`` block.

    use       from now on, for every thread that has chosen nothing else
    using     inside the block, for the running thread or task
    disabled  likewise, all but some
    route     likewise, for each row of the batch

A choice belongs to the model or to a context (surgery/host/active_set.py); it changes no weight and
no module. Each set of splices has its own graphs, which stay when another set is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from surgery.errors import SpliceError, shown, suggest
from surgery.host import ALL_ON, Choice, chosen, state_of
from surgery.rewrite import Rows, forget_leading
from surgery.splicer.record import look_up, reports, spliced_model

Names = str | Sequence[str] | Mapping[str, float]


def use(model: nn.Module, names: Names | None = None) -> nn.Module:
    """Choose which splices of a model run from now on, for every thread.

    What is spliced in or loaded later is on. Trainable parameters stay as ``freeze_base`` chose
    them; :func:`using` chooses for a ``with`` block and for the running thread alone.

    Args:
        model: a spliced model, or DDP, FSDP or ``torch.compile`` around it.
        names: one name, several, or a factor for each: with ``{"a": 0.7}`` every port changes by
            0.7 of what splice ``a`` changes it by. ``[]`` is the base; None is all of them.

    Returns:
        the model.

    Raises:
        SpliceError: nothing is spliced in under a name, or a splice cannot be scaled.

    Example:
        ``surgery.use(model, {"style": 0.7, "domain": 0.3})``
    """
    whole = spliced_model(model)
    require_spliced(whole)
    choice = ALL_ON if names is None else choice_of(whole, names)
    with _chosen(whole, choice):  # a choice that cannot be made raises here
        look_up(whole).switches.default = choice
    forget_leading()
    return model


@contextmanager
def using(model: nn.Module, names: Names) -> Iterator[nn.Module]:
    """Run these splices and no others inside the block; ``names`` as for :func:`use`.

    This holds for the running thread or task alone; threads that are started inside the block run
    the model as it is. Gradient checkpointing repeats a forward as it first ran.

    Raises:
        SpliceError: nothing is spliced in under a name, or a splice cannot be scaled.

    Example:
        ``with surgery.using(model, {"first": 0.5}): model(**inputs)``
    """
    whole = spliced_model(model)
    require_spliced(whole)
    with _chosen(whole, choice_of(whole, names)):
        yield model


@contextmanager
def disabled(model: nn.Module, name: str | None = None) -> Iterator[nn.Module]:
    """Run the model without one splice, or without any, inside a ``with`` block.

    This holds for the running thread or task alone; threads that are started inside the block run
    the model as it is. Gradient checkpointing repeats a forward as it first ran.

    Raises:
        SpliceError: nothing is spliced under that name.

    Example:
        ``with surgery.disabled(model, "first"): model(**inputs)``
    """
    whole = spliced_model(model)
    require_spliced(whole, *([] if name is None else [name]))
    switches = look_up(whole).switches
    now = switches.now()
    off = switches.names if name is None else {name}
    on = (switches.names if now.on is None else now.on) - off
    with _chosen(whole, Choice(on, {n: s for n, s in now.shares.items() if n in on})):
        yield model


@contextmanager
def route(
    names: Sequence[str | Sequence[str] | Mapping[str, float] | None],
    model: nn.Module | None = None,
) -> Iterator[None]:
    """Run each example of the batch with splices of its own, inside the ``with`` block.

        with surgery.route(["a", None, "b"]):
            model.generate(**batch_of_three)

    Each inserted module sees the rows that have it, and no others. A batch of k times as many rows
    has k neighbours for each entry, as beam search has. Where a model puts all examples one after
    the other again, as classifier-free guidance does, give the route one entry for each row. The
    batch is taken to be the first axis where a model has no attention that shows it. This holds for
    the running thread or task.

    Args:
        names: for each example one name, several, a factor for each as for :func:`use`, or None
            for the base alone.
        model: the spliced model; by default every spliced model that runs inside the block.

    Raises:
        SpliceError: nothing is spliced in under a name, a splice changes what rows share, such as
            the length of the sequence, or the batch is not the first axis of its site.
        ForwardError: by the forward, if the rows of a batch are no multiple of the entries.

    Without ``model`` the forward raises all of them.

    Example:
        ``with surgery.route(["first", None]): model(**inputs)``
    """
    if isinstance(names, str):
        raise SpliceError(
            f"route({names!r}): a route is a list with an entry for each example, as [{names!r}, "
            f"None]. surgery.using(model, {names!r}) runs all of them with it."
        )
    entries = [_factors(each) for each in names]
    if not entries:
        raise SpliceError("a route needs one entry for each example of the batch, and has none.")
    every = dict.fromkeys(name for entry in entries for name in entry)
    if model is not None:
        model = spliced_model(model)
        at_zero = [n for each in names if isinstance(each, Mapping) for n in each]
        require_spliced(model, *every, *at_zero)
    shares: dict[str, float | Rows] = {}
    for name in every:
        rows = tuple(i for i, entry in enumerate(entries) if name in entry)
        factors = tuple(entries[i][name] for i in rows)
        if len(rows) < len(entries) or len({*factors}) > 1:
            plain = all(factor == 1 for factor in factors)
            shares[name] = Rows(rows, len(entries), () if plain else factors)
        elif factors[0] != 1:
            shares[name] = factors[0]
    choice = Choice(frozenset(every), shares)
    with chosen(choice, None) if model is None else _chosen(model, choice):
        yield


def _factors(names: Any) -> dict[str, float]:
    """Return the factor of each name of a choice.

    Raises:
        SpliceError: it is neither a name, nor several, nor numbers by name.
    """
    if names is None:
        return {}
    if isinstance(names, str):
        return {names: 1.0}
    if isinstance(names, Mapping):
        found = dict(names)
    else:
        several = isinstance(names, (list, tuple, set, frozenset))
        found = dict.fromkeys(names, 1.0) if several else {None: 0}
    for name, factor in found.items():
        number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
        if not isinstance(name, str) or not number or not abs(factor) < float("inf"):
            raise SpliceError(
                f"{shown(names)} does not say which splices run. Pass a name, a list of names, or "
                "finite factors by name, as {'a': 0.7}."
            )
    return {name: factor for name, factor in found.items() if factor != 0}


def in_use(model: nn.Module) -> dict[str, float]:
    """Return how far each splice of a model is on for every thread: 1 wholly, 0 not at all."""
    default = look_up(model).switches.default
    shares: Mapping[str, Any] = default.shares  # use() takes factors alone, and no rows
    return {n: float(shares.get(n, 1)) if default.has(n) else 0.0 for n in reports(model)}


def put_in_use(model: nn.Module, shares: Mapping[str, float]) -> None:
    """Set how far these splices are on for every thread; the others stay as they are."""
    use(model, {**in_use(model), **shares})


def choice_of(model: nn.Module, names: Names) -> Choice:
    """Return the choice of these splices of a model."""
    factors = _factors(names)
    at_zero = names if isinstance(names, Mapping) else ()
    require_spliced(model, *factors, *at_zero)
    return Choice(frozenset(factors), {n: f for n, f in factors.items() if f != 1})


@contextmanager
def _chosen(model: nn.Module, choice: Choice) -> Iterator[None]:
    """Let a choice hold inside the block; it is tried on every host first."""
    with chosen(choice, look_up(model).switches):
        known = list(reports(model).values())  # another thread may splice or remove meanwhile
        for path in {i.site.path for report in known for i in report.inserted}:
            state = state_of(model.get_submodule(path))
            if state is not None:
                state.selection()  # made here, as Dynamo cannot make it
        yield


def require_spliced(model: nn.Module, *names: str) -> None:
    """Raise unless the model has splices of these names, or any if no name is given."""
    there = list(reports(model))
    for name in names or [""]:
        if name not in there and (name or not there):
            what = f"named {name!r} " if name else ""
            raise SpliceError(
                f"nothing {what}is spliced into this {type(model).__name__}. {suggest(name, there)}"
                f"Splices here: {', '.join(there) or 'none'}."
            )
