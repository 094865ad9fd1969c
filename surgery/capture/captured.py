"""Hold the graph of one forward, and the conditions under which it is the right one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from surgery.capture.branches import Branch
from surgery.capture.reads import Read


@dataclass
class Captured:
    """The graph of one forward, and the conditions under which it is the right one.

    Each node carries ``meta["value"]``, its example value, and ``meta["owner"]``, the path below
    the host of the module whose forward made the node. A node of an operation carries
    ``meta["line"]``, file and line of the model code that made it, or None.

    Attributes:
        branches: values that Python branched on.
        reads: what the forward read beside its arguments, with the answers (reads.py).
        parts: modules traced through or read from, and their parents: ``(parent, name, module)``.
        ambient: gradient mode and autocast, if the forward asked: ``(question, answer)``.
    """

    graph: fx.Graph
    branches: list[Branch]
    reads: list[Read] = field(default_factory=list)
    parts: list[tuple[Any, str, nn.Module]] = field(default_factory=list)
    ambient: list[tuple[Callable[[], Any], Any]] = field(default_factory=list)
