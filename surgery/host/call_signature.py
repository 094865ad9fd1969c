"""Describe a call of a host: the part of it that decides which graph the call needs.

    host(hidden, mask=None, past=cache, use_cache=True)
      signature   (active splices, autocast, shapes' lengths, dtypes, names, constants)
      inputs      [hidden, cache]     the values that the graph takes

Calls with equal signatures differ only in the values of tensors, numbers, strings and opaque
objects.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from surgery.interop import CONSTANT

PLAIN = frozenset({type(None), bool, torch.dtype, torch.device})  # compared by value


def signature(args: Any, kwargs: Any, active: tuple[str, ...]) -> tuple[Any, list[Any]]:
    """Return the signature of a call, and the inputs of its graph (see ``interop.leaves``)."""
    inputs: list[Any] = []
    given = _describe(args, inputs)
    named = _describe(kwargs.values(), inputs)
    return (active, autocast_dtypes(), given, tuple(kwargs), named), inputs


def autocast_dtypes() -> tuple[Any, ...]:
    """Return the dtypes of autocast, if it is on: a graph holds result dtypes as constants."""
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)


def _describe(values: Iterable[Any], inputs: list[Any]) -> tuple[Any, ...]:
    """Describe each value as far as it decides the graph; append the other values to ``inputs``."""
    described: list[Any] = []
    for x in values:
        kind = type(x)
        if kind in PLAIN:
            described.append(x)
        elif kind is tuple or kind is list:
            described.append((kind, _describe(x, inputs)))
        elif kind is dict:
            described.append((kind, tuple(x), _describe(x.values(), inputs)))
        elif kind is not str and isinstance(x, CONSTANT):
            described.append((kind, x))
        elif isinstance(x, (int, float, str)):
            inputs.append(x)
            described.append(kind)
        else:
            for position, other in enumerate(inputs):  # a few; Dynamo would guard an id()
                if other is x:
                    described.append((position,))
                    break
            else:
                inputs.append(x)
                described.append((x.dim(), x.dtype, x.device) if isinstance(x, Tensor) else kind)
    return tuple(described)
