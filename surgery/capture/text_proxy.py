"""Define a proxy of a string argument, which tells whether the forward reads the string.

Some strings are passed on, such as the id of a request; others choose the path of the forward. A
graph is good for any value of the first, and for one value of the second.

    attend(q, k, v, request=text)    passed on to what is kept whole: an input of the graph
    if text == "mean"                read: the string itself answers, a branch records its value
    torch.einsum(text, x)            read: what comes out depends on it

Code can go another way for a proxy than for a string without a read: it asks for the exact type or
the identity, or C code raises where it gets no string. Such a capture is made again with the
strings themselves (``capture.forward``), and the graph is for these values alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from surgery.capture.proxy import ValueProxy

_READS = "eq ne lt le gt ge add mod mul rmul contains getitem iter hash str repr format".split()


class TextProxy(ValueProxy):
    """A string argument: any use but passing it on is a branch on its value."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tracer.concrete(self, str), name)

    def __radd__(self, other: Any) -> Any:
        return other + self.tracer.concrete(self, str)


def _read(name: str) -> Callable[..., Any]:
    """Return the method of this name that asks the string itself."""

    def method(self: TextProxy, *args: Any) -> Any:
        return getattr(self.tracer.concrete(self, str), name)(*args)

    return method


for _name in _READS:
    setattr(TextProxy, f"__{_name}__", _read(f"__{_name}__"))


def texts_in(structure: Any) -> Iterator[TextProxy]:
    """Yield the string arguments among nested values."""
    if type(structure) is TextProxy:
        yield structure
    elif type(structure) in (tuple, list, dict):
        for x in structure.values() if type(structure) is dict else structure:
            yield from texts_in(x)


def structure_of(value: Any) -> Any:
    """Describe a value as far as Python code can tell it from another without a branch."""
    if isinstance(value, Tensor):
        return value.dim(), value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(structure_of, value))
    if isinstance(value, dict):
        return type(value), tuple(value), tuple(map(structure_of, value.values()))
    return type(value)
