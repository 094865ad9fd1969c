"""Run the experts that got no token of the example, so that their projections are sites, too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from surgery.locator.run_record import Call, Observation, floats_in
from surgery.patterns import innermost


def run_idle_experts(
    observation: Observation, lists: dict[str, list[str]], modules: Mapping[str, nn.Module]
) -> None:
    """Run each idle expert with the arguments of a sibling; its calls count as the example's.

    An expert that cannot take them, as one of another width, stays as it was.
    """
    for path, sibling in _idle(observation.calls, lists):
        before = dict(observation.calls)
        for name in [n for n in before if innermost(n, [path])]:
            del observation.calls[name]
        try:
            modules[path](*sibling.args, **sibling.kwargs)
        except Exception:  # of any kind: it is the model's own code
            observation.calls = before


def is_routed(calls: dict[str, Call], lists: dict[str, list[str]], given: Any) -> bool:
    """Whether some of these experts got fewer rows than the module that was ``given`` them."""
    whole = sum(x.numel() for x in floats_in(given)[:1])
    children = [child for each in lists.values() for child in each]
    return any(child not in calls or _size(calls[child]) < whole for child in children)


def _idle(calls: dict[str, Call], lists: dict[str, list[str]]) -> Iterator[tuple[str, Call]]:
    """Yield the experts that got no token, each with the call of one that did."""
    for children in lists.values():
        ran = [child for child in children if child in calls and _size(calls[child])]
        for child in children if ran else ():
            if child not in ran:
                yield child, calls[ran[0]]


def _size(call: Call) -> int:
    """Return the number of elements of the first tensor that a call was given."""
    return sum(x.numel() for x in floats_in((call.args, call.kwargs))[:1])
