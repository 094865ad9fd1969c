"""Cast what an inserted module reads and returns, where its dtype is not that of its port.

Inserted modules stay in float32 on a base in half precision, so that small steps of an optimiser
are not rounded away. The casts are nodes of the graph; there are none where the dtypes agree, and
none under autocast, which casts by itself. The lse is float32 in every dtype and is never cast.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.capture import Read
from surgery.patterns import value
from surgery.plugin import referred


def dtype_parameter(module: nn.Module) -> nn.Parameter | None:
    """Return the parameter whose dtype is the dtype of an inserted module; None if it has none.

    A module without parameters of its own may use those of another one that it refers to.
    """
    for each in chain([module], referred(module)):  # the second is looked for at need
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


def dtype_of(module: nn.Module) -> torch.dtype | None:
    """Return the dtype of an inserted module; None if it has none."""
    parameter = dtype_parameter(module)
    return None if parameter is None else parameter.dtype


def as_taken(module: nn.Module, x: Tensor) -> Tensor:
    """Return ``x`` in the dtype of an inserted module, which autocast chooses where it is on."""
    dtype = dtype_of(module)
    return x if dtype is None or torch._C._is_any_autocast_enabled() else cast(x, dtype)


def as_module_takes(
    reads: Sequence[fx.Node | None], names: Sequence[str], port: fx.Node, module: nn.Module
) -> tuple[fx.Node | None, ...]:
    """Return the nodes that a module reads, each in the module's dtype.

    A model may compute a part in another dtype, so each node counts; the port does for a parameter.
    """
    made: list[fx.Node | None] = []
    for node, name in zip(reads, names, strict=True):
        if node is not None and name != "lse":
            dtype = needed_cast(port if _example(node) is None else node, module)
            if dtype is not None:
                with node.graph.inserting_after(node):
                    node = node.graph.call_function(cast, (node, dtype))
        made.append(node)
    return tuple(made)


def needed_cast(node: fx.Node, module: nn.Module) -> torch.dtype | None:
    """Return the dtype that a module needs a node's value in; None if it has it already."""
    parameter, held = dtype_parameter(module), _example(node)
    same = parameter is None or not isinstance(held, Tensor) or held.dtype == parameter.dtype
    if same or not held.is_floating_point() or torch._C._is_any_autocast_enabled():
        return None
    assert parameter is not None
    return parameter.dtype


def _example(node: fx.Node) -> Any:
    """Return the value of a node; of one that an edit has made, that of its first input."""
    while value(node) is None and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return value(node)
