"""What the forward of an inserted module offers, told from its class."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn


def adds_onto(module: nn.Module) -> bool:
    """Whether ``module`` is an :class:`AddsOnto`: its forward has a parameter ``onto``."""
    forward = getattr(type(module), "forward", None)
    return callable(forward) and _takes_onto(forward)


@functools.lru_cache(maxsize=1024)  # asked for at each call of a module
def _takes_onto(forward: Any) -> bool:
    return "onto" in inspect.signature(forward).parameters


def starts_with_product(module: nn.Module) -> bool:
    """Whether ``module`` is a :class:`StartsWithProduct`.

    A subclass that overrides ``forward`` alone is none: what it inherits describes another forward.
    """
    return adds_onto(module) and _describes_forward(type(module))  # type: ignore[arg-type]


@functools.cache
def _describes_forward(kind: Any) -> bool:
    order = kind.__mro__

    def depth(name: str) -> int:
        return next((i for i, each in enumerate(order) if name in vars(each)), len(order))

    offered = depth("after_product") < len(order)
    return offered and depth("first_factor") <= depth("forward") < len(order)
