"""Signature: what about a call decides which graph it needs, and code that knows it again.

To describe a call takes as long as some of its operations: where weights stream through the
caches, whatever a decoded token touches for the first time is far away. So the description of a
graph's calls, and the conditions that it relies on, are also written as straight-line code that
compares and builds nothing, and is asked first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surgery.interop import CONSTANT

_PLAIN = frozenset({type(None), bool, str, torch.dtype, torch.device})


_SINGLE = frozenset({type(None), bool, torch.dtype})  # equal ones are one object


_cast = torch._C._is_any_autocast_enabled  # not what a capture may have put elsewhere for a while


_MISSING = object()


Recogniser = Callable[[Any, Any, Any], list[Any] | None]


def signature(args: Any, kwargs: Any, active: tuple[str, ...]) -> tuple[Any, list[Any]]:
    """The structure of a call, and the inputs of its graph (see ``values.leaves``).

    Two calls of one structure differ only in values of tensors, numbers and opaque objects.
    """
    inputs: list[Any] = []
    given = _describe(args, inputs)
    named = _describe(kwargs.values(), inputs)
    return (active, _autocast(), given, tuple(kwargs), named), inputs


class Conditions(NamedTuple):
    """What a graph relies on beside the structure of its call."""

    reads: Sequence[tuple[dict[str, Any], str, Any]] = ()  # attributes, the name of one, its value
    parts: Sequence[tuple[dict[str, Any], str, Any]] = ()  # children, the name of one, which it is
    ambient: Sequence[tuple[Callable[[], Any], Any]] = ()  # a question, its answer
    early: Callable[..., bool] | None = None  # of the module and the inputs

    def hold(self, module: Any, inputs: list[Any]) -> bool:
        """Do they, for a call with these inputs?"""
        for attributes, name, expected in self.reads:
            if attributes.get(name, _MISSING) != expected:
                return False
        for children, name, part in self.parts:
            if children.get(name) is not part:
                return False
        for question, expected in self.ambient:
            if question() != expected:
                return False
        return self.early is None or self.early(module, inputs)


def recogniser(args: Any, kwargs: Any, conditions: Conditions) -> Recogniser | None:
    """``f(module, args, kwargs)``: the inputs of a call's graph, or None.

    None if the call has another signature, or if the conditions do not hold. It never takes one
    signature for another, but may miss one that is the same. There is none under autocast, where
    it would miss them all.
    """
    if _autocast():
        return None
    writer = _Writer()
    code = [
        "def inputs_of(module, args, kwargs):",
        "    if cast():",
        "        return None",
        *writer.sequence("args", args),
        *writer.mapping("kwargs", kwargs),
        f"    inputs = [{', '.join(writer.inputs)}]",
        *writer.conditions(conditions),
        "    return inputs",
    ]
    exec("\n".join(code), writer.names)
    made: Recogniser = writer.names["inputs_of"]
    return made


def _autocast() -> tuple[Any, ...]:
    """The lower dtypes that operations take now: a graph has those of its results as constants."""
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)


def _describe(values: Iterable[Any], inputs: list[Any]) -> tuple[Any, ...]:
    """What decides about the graph in each value; the others are appended to ``inputs``."""
    known: list[Any] = []
    for x in values:
        kind = type(x)
        if kind in _PLAIN:
            known.append(x)
        elif kind is tuple or kind is list:
            known.append((kind, _describe(x, inputs)))
        elif kind is dict:
            known.append((kind, tuple(x), _describe(x.values(), inputs)))
        elif isinstance(x, CONSTANT):
            known.append((kind, x))
        elif isinstance(x, (int, float)):
            inputs.append(x)
            known.append(kind)
        else:
            for position, other in enumerate(inputs):  # a few; Dynamo would guard an id()
                if other is x:
                    known.append((position,))
                    break
            else:
                inputs.append(x)
                known.append((x.dim(), x.dtype, x.device) if isinstance(x, Tensor) else kind)
    return tuple(known)


class _Writer:
    """Writes the lines that tell a value like a given one, and binds what they name."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"cast": _cast, "missing": _MISSING}
        self.inputs: list[str] = []
        self._values: list[Any] = []  # of the inputs

    def sequence(self, name: str, values: Any) -> list[str]:
        parts = [f"{name}_{i}" for i in range(len(values))]
        lines = [_unless(f"len({name}) == {len(parts)}")]
        lines += [f"    {', '.join(parts)}, = {name}"] if parts else []
        return lines + [
            line for part, x in zip(parts, values, strict=True) for line in self.value(part, x)
        ]

    def mapping(self, name: str, values: Any) -> list[str]:
        keys = self._bind(tuple(values))
        parts = [f"{name}_{i}" for i in range(len(values))]
        lines = [_unless(f"tuple({name}) == {keys}")]
        lines += [f"    {', '.join(parts)}, = {name}.values()"] if parts else []
        for part, x in zip(parts, values.values(), strict=True):
            lines += self.value(part, x)
        return lines

    def value(self, name: str, x: Any) -> list[str]:
        kind = type(x)
        if kind in _SINGLE:
            return [_unless(f"{name} is {self._bind(x)}")]
        same = f"type({name}) is {self._bind(kind)}"
        if kind in _PLAIN or isinstance(x, CONSTANT):
            return [_unless(f"{same} and {name} == {self._bind(x)}")]
        if kind is tuple or kind is list:
            return [_unless(same), *self.sequence(name, x)]
        if kind is dict:
            return [_unless(same), *self.mapping(name, x)]
        if not isinstance(x, (int, float)):
            seen = [
                other for other, held in zip(self.inputs, self._values, strict=True) if held is x
            ]
            if seen:
                return [_unless(f"{name} is {seen[0]}")]
            alike = zip(self.inputs, self._values, strict=True)
            same += "".join(f" and {name} is not {n}" for n, held in alike if type(held) is kind)
        if isinstance(x, Tensor):
            place = f"{name}.is_cpu" if x.is_cpu else f"{name}.device == {self._bind(x.device)}"
            same += f" and {name}.dim() == {x.dim()} and {name}.dtype is {self._bind(x.dtype)}"
            same += f" and {place}"
        self.inputs.append(name)
        self._values.append(x)
        return [_unless(same)]

    def conditions(self, these: Conditions) -> list[str]:
        """The lines of ``these.hold``."""
        named = {id(known): known for known, _, _ in (*these.reads, *these.parts)}
        names = {key: self._bind(known) for key, known in named.items()}
        lines = []
        for known, name, value in these.reads:
            place = f"{names[id(known)]}.get({name!r}, missing)"
            lines.append(_unless(f"{place} == {self._bind(value)}"))
        for known, name, part in these.parts:
            lines.append(_unless(f"{names[id(known)]}.get({name!r}) is {self._bind(part)}"))
        for question, answer in these.ambient:
            lines.append(_unless(f"{self._bind(question)}() == {self._bind(answer)}"))
        if these.early is not None:
            lines.append(_unless(f"{self._bind(these.early)}(module, inputs)"))
        return lines

    def _bind(self, x: Any) -> str:
        name = f"c{len(self.names)}"
        self.names[name] = x
        return name


def _unless(condition: str) -> str:
    return f"    if not ({condition}):\n        return None"
