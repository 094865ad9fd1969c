"""Branch the values that a capture branched on, and tell which can be checked before a graph runs.

A graph is one path through a forward. Where Python asked a proxy for its truth, its length or a
number, the answer chose that path, so the graph fits another call only if the answer is the same
there. The check can come before the graph runs if it needs no tensor and changes nothing.
"""

from __future__ import annotations

import functools
import math
import operator
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

MATH = "sqrt ceil floor log log2 prod gcd exp pow trunc".split()


_PURE_METHODS = ("size", "dim", "numel", "get", "keys", "values", "items", "stride")


_PURE = {getattr, operator.getitem, operator.contains, len, isinstance, min, max, sum, round}


_PURE |= {
    getattr(operator, n) for n in "eq ne lt le gt ge add sub mul floordiv truediv mod".split()
}


_PURE |= {getattr(operator, n) for n in "neg pos not_ and_ or_ pow".split()}


_PURE |= {getattr(math, n) for n in MATH}


@dataclass
class Branch:
    """What chose the path of a graph: ``convert(value of node) == expected``.

    Attributes:
        node: the node whose value Python asked for.
        convert: the question, such as ``bool`` or ``len``.
        expected: the answer during the capture.
        where: file and line of the model that asked.
    """

    node: fx.Node
    convert: Callable[[Any], Any]
    expected: Any
    where: str


def is_pure(node: fx.Node) -> bool:
    """Whether this node may be evaluated before the graph runs: no tensor work, no side effect.

    The caller checks the node's inputs, except tuples and lists, which are checked here.
    """
    if node.op == "placeholder":
        return True
    if isinstance(node.meta.get("value"), Tensor) and not reads_opaque(node):
        return False
    if any(not is_pure(n) for n in node.all_input_nodes if _holds_tensors(n)):
        return False  # an item that a module or an attention function returns
    return _looks_up(node) or (
        node.op == "call_function"
        and (node.target in _PURE or getattr(node.target, "__name__", "") == "constant")
    )


def reads_opaque(node: fx.Node) -> bool:
    """Whether this node looks something up in an opaque object, such as a length in a cache."""
    base = node.args[0] if node.args else None
    if not isinstance(base, fx.Node) or isinstance(base.meta.get("value"), (Tensor, tuple)):
        return False
    return _looks_up(node) and base.meta.get("value") is not None


def _looks_up(node: fx.Node) -> bool:
    """Whether this node only reads: getattr, an index, or a method whose name promises that."""
    if node.op == "call_method":
        name = str(node.target)
        return name in _PURE_METHODS or name.startswith(("get_", "is_", "has_"))
    return node.op == "call_function" and node.target in (getattr, operator.getitem)


def _holds_tensors(node: fx.Node) -> bool:
    """Whether the value of this node is a tuple or list, which may hold tensors."""
    return isinstance(node.meta.get("value"), (tuple, list))


def user_line() -> str:
    """Return file and line of the model code that is running now."""
    for frame in reversed(traceback.extract_stack()):
        if not _internal(frame.filename):
            return f"{frame.filename}:{frame.lineno} ({frame.line})"
    return "an unknown line"


def model_line() -> tuple[str, int] | None:
    """Return file and line of the model code that makes a node now; None between two forwards.

    Modules of torch are model code, unlike the functions that they call.
    """
    frame = sys._getframe(1).f_back
    while frame is not None and frame.f_code.co_filename != _CAPTURE:
        if _is_model_code(frame.f_code.co_filename):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return None


_CAPTURE = __file__.replace("branches.py", "forward.py")  # it calls the forward


@functools.cache
def _is_model_code(filename: str) -> bool:
    """Whether a file holds the code of a model, or a module of torch."""
    name = filename.replace("\\", "/")
    return not _internal(filename) or (
        "/torch/nn/modules/" in name and not name.endswith("/module.py")
    )


def line_of(error: BaseException) -> str:
    """Return file and line of the model code that raised ``error``."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _internal(f.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else "?"


def _internal(filename: str) -> bool:
    """Whether a file belongs to this library or to torch, or is generated code."""
    name = filename.replace("\\", "/")
    here = __file__.replace("\\", "/").rsplit("/", 2)[0] + "/"  # the folder surgery/
    return name.startswith((here, "<")) or "/torch/" in name
