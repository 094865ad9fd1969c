"""Let an inserted module read what the running call is about: positions, padding, cached.

    trunk(ids, mask, cache)          a hook notes the facts of the call (interop/call_facts.py)
      |
      v
    block ... site of a method       a node asks for them, in the axes of the site's tokens

A host that runs by itself, or in a model without a trunk, is told of tokens that are all real, at
positions 0, 1, 2, ..., with nothing cached.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from surgery.errors import ForwardError
from surgery.interop import CALL_FACTS
from surgery.patterns import Match, PortNode, value
from surgery.rewrite.nodes import after_inputs


def positions_at(x: Tensor, heads: bool) -> Tensor:
    """Return the position of each token of x, see :func:`_at`."""
    return _at("positions", x, heads)


def padding_at(x: Tensor, heads: bool) -> Tensor:
    """Return whether each token of x is real, see :func:`_at`."""
    return _at("padding", x, heads)


def cached_at(x: Tensor, heads: bool) -> Tensor:
    """Return how many places the cache held before the call, a tensor without axes."""
    facts = CALL_FACTS.get()
    if facts is None:
        return torch.zeros((), dtype=torch.long, device=x.device)
    return facts.cached.to(x.device)


ASKS = {"positions": positions_at, "padding": padding_at, "cached": cached_at}


def _at(name: str, x: Tensor, heads: bool) -> Tensor:
    """Return a fact of each token, in the axes of x (B, n, D) before the last.

    Args:
        heads: x is (B, H, n, d).
    """
    shape = (x.shape[0], x.shape[-2]) if heads else x.shape[:-1]
    facts = CALL_FACTS.get()
    if facts is None:
        return _alone(name, x, shape)
    if not facts.sure and facts.padding is not None and facts.padding.shape != shape:
        return _alone(name, x, shape)
    known = facts.positions if name == "positions" else facts.padding
    if known is None:
        raise ForwardError(
            f"a module reads {name!r}, and the mask of this call is of a kind that says nothing of "
            "single tokens. Pass a mask (B, m) of ones and zeros as attention_mask."
        )
    if len(shape) == 2 and known.shape != shape and known.numel() != 0:
        raise ForwardError(
            f"a module reads {name!r} where there are {tuple(shape)} tokens, and the call is of "
            f"{tuple(known.shape)}: what is in front of this site adds, drops or sorts tokens. "
            "Read it at a site before that."
        )
    return known.to(x.device).reshape(shape)


def _alone(name: str, x: Tensor, shape: Any) -> Tensor:
    """Return a fact of tokens that are all real, in the order in which they come."""
    if name == "padding":
        return torch.ones(shape, dtype=torch.bool, device=x.device)
    if len(shape) < 2:
        return torch.arange(shape[0], device=x.device)
    counted = torch.arange(math.prod(shape[1:]), device=x.device)
    return counted.reshape(shape[1:]).expand(shape)


def read_fact(match: Match, port: PortNode, name: str) -> fx.Node:
    """Return a node with a fact of the call, for a module at ``port``."""
    like = match.ports.get("input") or port
    node, heads = like.node, like is port and match.kind == "attention" and _has_heads(port)
    with node.graph.inserting_after(after_inputs(node)):
        made = node.graph.call_function(ASKS[name], (node, heads))
    made.meta.update(owner=node.meta.get("owner"), value=ASKS[name](value(node), heads))
    return made


def _has_heads(port: PortNode) -> bool:
    return bool(value(port.node).dim() == 4)
