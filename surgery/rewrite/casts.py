"""Cast what an inserted module reads and returns, where its dtype is not that of its port.

Inserted modules stay in float32 on a base in half precision, so that small steps of an optimiser
are not rounded away. The casts are nodes of the graph; there are none where the dtypes agree, and
none under autocast, which casts by itself. The lse is float32 in every dtype and is never cast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from surgery.capture import Read
from surgery.patterns import value
from surgery.plugin import referred


def dtype_parameter(module: nn.Module) -> nn.Parameter | None:
    """Return the parameter whose dtype is the dtype of an inserted module; None if it has none.

    A module without parameters of its own may use those of another one that it refers to.
    """
    for each in (module, *referred(module)):
        for parameter in each.parameters():
            if parameter.is_floating_point():
                return parameter
    return None


def dtype_reads(module: nn.Module) -> list[Read]:
    """Return what a graph with this inserted module relies on: the dtype of its parameters."""
    parameter = dtype_parameter(module)
    return [] if parameter is None else [Read("attribute", parameter, "dtype", parameter.dtype)]


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x`` in ``dtype``; whole numbers and masks stay as they are."""
    return x.to(dtype) if x.is_floating_point() and x.dtype != dtype else x


def as_module_takes(
    reads: Sequence[fx.Node | None], names: Sequence[str], port: fx.Node, module: nn.Module
) -> tuple[fx.Node | None, ...]:
    """Return the nodes that a module reads, each followed by a cast to the module's dtype."""
    dtype = needed_cast(port, module)
    if dtype is None:
        return tuple(reads)
    made: list[fx.Node | None] = []
    for node, name in zip(reads, names, strict=True):
        if node is not None and name != "lse":
            with node.graph.inserting_after(node):
                node = node.graph.call_function(cast, (node, dtype))
        made.append(node)
    return tuple(made)


def needed_cast(port: fx.Node, module: nn.Module) -> torch.dtype | None:
    """Return the dtype that a module needs its reads in; None if they have it already."""
    parameter, held = dtype_parameter(module), value(port)
    same = parameter is None or not isinstance(held, Tensor) or held.dtype == parameter.dtype
    if same or not held.is_floating_point() or torch._C._is_any_autocast_enabled():
        return None
    assert parameter is not None
    return parameter.dtype
