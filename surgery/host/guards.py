"""Decide whether a captured graph still fits a call of its host.

A graph is one path through the host's forward. It fits a call if the call has the graph's
signature and if everything that capture read beside the arguments is as it was:

    texts      string arguments that the forward read
    reads      what the forward read from Python's state: attributes, globals, closures, lists
    parts      the child modules that the graph traces through
    ambient    gradient mode, autocast, the chosen attention function
    early      branches on values that can be evaluated before the graph runs

Describing a call costs about as much as a small operator, which is noticeable when decoding one
token at a time. So a :class:`Recogniser` is written for each graph: straight-line Python that
compares a call with the graph's signature and guards and builds nothing but the list of
inputs. It may miss a call that fits; it never accepts one that does not. A missed call takes the
slow way, ``signature`` and ``Guards.hold``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surgery.capture import MISSING, Read, TensorKind, contents, same
from surgery.host.call_signature import PLAIN, autocast_dtypes
from surgery.interop import CONSTANT

_compiling = torch.compiler.is_dynamo_compiling
_SINGLE = frozenset({type(None), bool, torch.dtype})  # equal ones are one object


# Bound here: while a capture runs, torch's own name may stand for a recording replacement.
_autocast_is_on = torch._C._is_any_autocast_enabled


_NAMES: dict[str, Any] = {
    "cast": _autocast_is_on,
    "missing": MISSING,
    "is_": operator.is_,
    "same": same,
    "contents": contents,
}


Recogniser = Callable[[Any, Any, Any], list[Any] | None]


class Guards(NamedTuple):
    """What a graph relies on beside the signature of its call."""

    reads: Sequence[Read] = ()
    # Those that Dynamo can guard, too: numbers and their like, and functions by identity.
    followed: Sequence[tuple[dict[str, Any], str, Any]] = ()
    functions: Sequence[tuple[dict[str, Any], str, Any]] = ()
    parts: Sequence[tuple[dict[str, Any], str, Any]] = ()  # (children, name, module)
    ambient: Sequence[tuple[Callable[[], Any], Any]] = ()  # (question, answer)
    early: Callable[..., bool] | None = None  # called with the host and the inputs
    texts: Sequence[tuple[int, str]] = ()  # (which of the inputs, value)

    def hold(self, module: Any, inputs: list[Any]) -> bool:
        """Whether all guards hold for a call with these inputs."""
        for position, text in self.texts:
            if inputs[position] != text:
                return False
        if _compiling():
            for attributes, name, expected in self.followed:
                if attributes.get(name, MISSING) != expected:
                    return False
            for known, name, function in self.functions:
                if known.get(name) is not function:
                    return False
        elif not all(read.holds() for read in self.reads):
            return False
        for children, name, part in self.parts:
            if children.get(name) is not part:
                return False
        for question, expected in self.ambient:
            if question() != expected:
                return False
        return self.early is None or self.early(module, inputs)

    def unmet(self) -> list[str]:
        """Describe the reads that now give another answer."""
        return [f"{read}, now {read.again()!r:.60}" for read in self.reads if not read.holds()]


def recogniser(args: Any, kwargs: Any, guards: Guards) -> Recogniser | None:
    """Write the recogniser of the calls like this one.

    ``recogniser(args, kwargs, guards)(module, args, kwargs)`` returns the inputs of the call's
    graph, or None if the call has another signature or a guard does not hold. Under autocast
    there is no recogniser, as it would miss every call.
    """
    if autocast_dtypes():
        return None
    writer = _Writer(dict(guards.texts))
    code = [
        "def inputs_of(module, args, kwargs):",
        "    if cast():",
        "        return None",
        *writer.sequence("args", args),
        *writer.mapping("kwargs", kwargs),
        f"    inputs = [{', '.join(writer.inputs)}]",
        *writer.reads(guards.reads),
        *writer.guards(guards),
        "    return inputs",
    ]
    exec("\n".join(code), writer.names)
    made: Recogniser = writer.names["inputs_of"]
    return made


class _Writer:
    """Writes lines of code that compare a value with a given one, and binds their names."""

    def __init__(self, texts: dict[int, str]) -> None:
        self.names: dict[str, Any] = dict(_NAMES)
        self._texts = texts
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
        if kind in PLAIN or (kind is not str and isinstance(x, CONSTANT)):
            return [_unless(f"{same} and {name} == {self._bind(x)}")]
        if kind is tuple or kind is list:
            return [_unless(same), *self.sequence(name, x)]
        if kind is dict:
            return [_unless(same), *self.mapping(name, x)]
        if kind is str and len(self.inputs) in self._texts:
            same += f" and {name} == {self._bind(self._texts[len(self.inputs)])}"
        if not isinstance(x, (int, float, str)):
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

    def reads(self, reads: Sequence[Read]) -> list[str]:
        """Write ``read.holds()`` of all reads: items of one place are fetched together."""
        lines = []
        for _, group in groupby(sorted(reads, key=_place), key=_place):
            these = list(group)
            how, place = these[0].how, self._bind(these[0].place)
            if how == "contents":
                answer = self._bind(these[0].answer)
                lines.append(_unless(f"same(contents({place}), {answer})"))
            plain = [r for r in these if how == "item" and _is_plain(r.answer)]
            absent = {r.name for r in these if how == "item" and r.answer is MISSING}
            if plain:
                fetch = self._bind(operator.itemgetter(*(r.name for r in plain)))
                answers = tuple(r.answer for r in plain)
                expected = self._bind(answers if len(plain) > 1 else answers[0])
                lines.append(f"    now = {fetch}({place})")
                quick = (
                    f"all(map(is_, now, {expected}))" if len(plain) > 1 else f"now is {expected}"
                )
                lines.append(_unless(f"{quick} or same(now, {expected})"))
            if absent:
                lines.append(_unless(f"{place}.keys().isdisjoint({self._bind(absent)})"))
            for read in these:
                answer = self._bind(read.answer)
                if how == "item" and type(read.answer) is TensorKind:
                    lines.append(_unless(f"same({place}.get({read.name!r}), {answer})"))
                elif how == "attribute":
                    fetch = f"getattr({place}, {read.name!r}, missing)"
                    lines.append(_unless(f"{fetch} is {answer} or same({fetch}, {answer})"))
        inside = [f"    {line}" for text in lines for line in text.split("\n")]
        caught = "(KeyError, AttributeError, ValueError)"  # gone: an item, an attribute, a cell
        return (
            ["    try:", *inside, f"    except {caught}:", "        return None"] if lines else []
        )

    def guards(self, these: Guards) -> list[str]:
        """Write what ``these.hold`` asks after the reads."""
        named = {id(known): known for known, _, _ in these.parts}
        names = {key: self._bind(known) for key, known in named.items()}
        lines = []
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


def _place(read: Read) -> tuple[str, int]:
    return read.how, id(read.place)


def _is_plain(answer: Any) -> bool:
    """Whether ``answer`` is compared by itself, and is there."""
    return answer is not MISSING and type(answer) is not TensorKind


def _unless(condition: str) -> str:
    return f"    if not ({condition}):\n        return None"
