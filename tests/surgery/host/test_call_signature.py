"""Tests of surgery.signature: code that knows a call again takes no call for another."""

from __future__ import annotations

import functools
from enum import Enum
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.capture import MISSING, Read, contents
from surgery.host.call_signature import signature
from surgery.host.guards import Guards
from surgery.host.guards import recogniser as recogniser_of


class Kind(Enum):
    A = 1
    B = 2


class Cache:
    """Something opaque."""


def recogniser(args: Any, kwargs: Any) -> Any:
    """One without conditions."""
    known = recogniser_of(args, kwargs, Guards())
    return known if known is None else functools.partial(known, None)


# A few objects, so that two calls have many in common and one call some of them twice.
TENSORS = [
    torch.zeros(2),
    torch.zeros(2),
    torch.zeros(1, 2),
    torch.zeros(2, dtype=torch.long),
    torch.zeros(2, device="meta"),
    torch.nn.Parameter(torch.zeros(2)),
]
CACHES = [Cache(), Cache(), torch.nn.Identity()]
PLAIN = [None, True, False, 0, 1, 1.0, "a", "b", Kind.A, Kind.B, int, torch.float32, torch.int64]
DEVICES = [torch.device("cpu"), torch.device("meta")]
FAMILIES = [TENSORS, CACHES, PLAIN, ["a", "b", "c"], [Kind.A, Kind.B], DEVICES]
VALUES = st.recursive(
    st.sampled_from(FAMILIES).flatmap(st.sampled_from),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.lists(inner, max_size=2).map(tuple)
        | st.dictionaries(st.sampled_from("xyz"), inner, max_size=2)
    ),
    max_leaves=3,
)
CALLS = st.tuples(
    st.lists(VALUES, max_size=2).map(tuple),
    st.dictionaries(st.sampled_from("uvw"), VALUES, max_size=2),
)


@st.composite
def neighbours(draw: st.DrawFn) -> tuple[Any, Any]:
    """Two calls that differ in one leaf, or in one name."""
    args, kwargs = draw(CALLS)
    if draw(st.booleans()):
        names = draw(st.permutations("uvw"))
        return (args, kwargs), (args, dict(zip(names, kwargs.values(), strict=False)))
    at, count = draw(st.integers(0, 3)), 0

    def changed(x: Any) -> Any:
        nonlocal count
        if type(x) in (list, tuple):
            return type(x)([changed(y) for y in x])
        if isinstance(x, dict):
            return {k: changed(v) for k, v in x.items()}
        count += 1
        if count - 1 != at:
            return x
        family = next(f for f in FAMILIES[::-1] if any(x is y for y in f))
        return draw(st.sampled_from(family))

    return (args, kwargs), (changed(args), changed(kwargs))


def same(given: list[Any] | None, expected: list[Any]) -> bool:
    return given is not None and [*map(id, given)] == [*map(id, expected)]


@settings(max_examples=400)
@given(calls=neighbours())
def test_a_call_is_known_again_and_none_is_taken_for_another(calls: Any) -> None:
    call, other = calls
    key, inputs = signature(*call, ())
    known = recogniser(*call)
    assert known is not None
    assert same(known(*call), inputs)
    key_of_other, inputs_of_other = signature(*other, ())
    found = known(*other)
    if found is not None:
        assert key_of_other == key
        assert same(found, inputs_of_other)


def test_under_autocast_nothing_is_known_again() -> None:
    call = (TENSORS[:1], {"x": 3})
    known = recogniser(*call)
    assert known is not None
    with torch.autocast("cpu"):
        assert known(*call) is None
        assert recogniser(*call) is None
    assert known(*call) is not None


@given(call=CALLS)
def test_other_tensors_of_the_same_kind_are_known_too(call: Any) -> None:
    known = recogniser(*call)
    assert known is not None
    made: dict[int, Any] = {}

    def other(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return type(x)(map(other, x))
        if isinstance(x, dict):
            return {k: other(v) for k, v in x.items()}
        if type(x) is torch.Tensor:
            return made.setdefault(id(x), torch.ones_like(x))
        return x

    again = other(call[0]), other(call[1])
    assert same(known(*again), signature(*again, ())[1])


def test_one_tensor_given_twice_is_another_call_than_two() -> None:
    a, b = TENSORS[:2]
    two, one = recogniser((a, b), {}), recogniser((a, a), {})
    assert two is not None
    assert one is not None
    assert same(two((b, a), {}), [b, a])
    assert two((a, a), {}) is None
    assert same(one((b, b), {}), [b])
    assert one((a, b), {}) is None


ANSWERS = st.sampled_from([None, True, False, 0, 1, 1.0, "a", torch.float32, Kind.A])
ATTRIBUTES = st.dictionaries(st.sampled_from("pqr"), ANSWERS, max_size=3)
CHILDREN = st.dictionaries(st.sampled_from("pqr"), st.sampled_from(CACHES), max_size=3)


@settings(max_examples=200)
@given(st.lists(ATTRIBUTES, min_size=1, max_size=2), CHILDREN, ANSWERS, st.booleans(), st.data())
def test_a_call_is_known_if_and_only_if_its_conditions_hold(
    owners: list[dict[str, Any]], children: Any, answer: Any, early: bool, data: st.DataObject
) -> None:
    x, module, seen = TENSORS[0], torch.nn.Identity(), []

    def asked_early(host: Any, inputs: list[Any]) -> bool:
        seen.append((host, inputs))
        return early

    now = {"answer": data.draw(ANSWERS)}
    items = [(owner, name) for owner in owners for name in owner]
    absent = [(owner, name) for owner in owners for name in "pqr" if name not in owner]
    reads = [Read("item", owner, name, owner[name]) for owner, name in items]
    reads += [Read("item", owner, name, MISSING) for owner, name in absent]
    objects = [SimpleNamespace(**owner) for owner in owners]
    kept = [{"a": owner} for owner in objects]
    reads += [Read("attribute", o, name, value) for o in objects for name, value in vars(o).items()]
    reads += [Read("contents", each, None, contents(each)) for each in kept]
    parts = [(children, name, part) for name, part in children.items()]
    questions = [(lambda: now["answer"], answer)]
    last = data.draw(st.sampled_from([asked_early, None]))
    conditions = Guards(reads, parts=parts, ambient=questions, early=last)
    known = recogniser_of((x,), {}, conditions)
    assert known is not None
    if data.draw(st.integers(0, 9)) == 0:
        kept[0][data.draw(st.sampled_from("ab"))] = None  # type: ignore[assignment]
    for changed in (*owners, *map(vars, objects), children):  # another value now, or gone
        for name in [n for n in changed if data.draw(st.integers(0, 4)) == 0]:
            other = data.draw(ANSWERS if changed is not children else st.sampled_from(CACHES))
            changed[name] = other
            if data.draw(st.booleans()):
                del changed[name]
    found = known(module, (x,), {})
    assert (found is not None) == conditions.hold(module, [x])
    assert found is None or same(found, [x])
    assert all(host is module and same(inputs, [x]) for host, inputs in seen)
