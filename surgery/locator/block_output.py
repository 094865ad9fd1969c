"""Describe the hidden states that a block takes and gives, as ports of its site.

    pre-norm     y = x + W a + b            the bias b of the last projection is added last
    post-norm    y = norm(x + W a) + b      the bias b of the last norm is

What adds a constant to y can be folded into such a bias.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.interop import silenced
from surgery.locator.run_record import Observation, floats_in
from surgery.patterns import inputs, op_name, value
from surgery.plugin import Port

_PASSED = ("add", "iadd", "radd", "dropout", "view", "reshape")


def ports_of_block(path: str, observation: Observation, model: nn.Module) -> dict[str, Port]:
    """Return ``input`` and ``output`` of a block, as far as its example call shows them."""
    call, result = observation.calls[path], observation.results.get(path)
    given = next(iter(floats_in((call.args, call.kwargs))), None)
    y = value(result)
    if not isinstance(y, Tensor) or y.dim() < 2 or not y.is_floating_point():
        return {}
    found = {}
    if given is not None and given.shape == y.shape:
        found["input"] = Port("input", y.shape[-1], None)
    bias = _added_last(result, path, y.shape, model) if result is not None else ""
    return found | {"output": Port("output", y.shape[-1], None, bias=bias)}


def _added_last(node: fx.Node, path: str, shape: torch.Size, model: nn.Module) -> str:
    """Return the name of the bias that is added to a block's output; empty if none is found."""
    waiting, size = [node], shape.numel()
    while waiting:
        node = waiting.pop()
        held = value(node)
        if not isinstance(held, Tensor) or held.shape[-1:] != shape[-1:] or held.numel() != size:
            continue
        name = _bias(node, path, model)
        if name:
            return name
        if op_name(node) in _PASSED or _passes(node, model):
            waiting += [each for each in inputs(node) if len(each.users) == 1]  # the last first
    return ""


def _passes(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node is a module that passes its input on in evaluation."""
    if node.op != "call_module":
        return False
    return isinstance(model.get_submodule(str(node.target)), (nn.Dropout, nn.Identity))


def _bias(node: fx.Node, path: str, model: nn.Module) -> str:
    """Return the name of the bias that a node adds last of all; empty if it adds none."""
    if node.op != "call_module":
        given = {"linear": node.args[2:3], "addmm": node.args[:1]}.get(op_name(node), ())
        found = next(iter(given), node.kwargs.get("bias"))
        own = isinstance(found, fx.Node) and found.op == "get_attr" and len(found.users) == 1
        return str(found.target) if own else ""  # type: ignore[union-attr]
    target = str(node.target)
    module: Any = model.get_submodule(target)
    inside = not path or target.startswith(f"{path}.")
    every = node.graph.find_nodes(op="call_module", target=target)
    calls = [each.meta["call"] for each in every]
    bias = getattr(module, "bias", None)
    if not inside or len(set(calls)) < len(calls) or not isinstance(bias, nn.Parameter):
        return ""
    return f"{target}.bias" if _is_added(module, bias, node) else ""


def _is_added(module: nn.Module, bias: nn.Parameter, node: fx.Node) -> bool:
    """Whether a module's output moves by one if its bias does."""
    x, y = value(inputs(node)[0]) if inputs(node) else None, value(node)
    if not isinstance(x, Tensor) or len(inputs(node)) != 1 or bias.shape != y.shape[-1:]:
        return False
    if x.is_meta or bias.is_meta:
        return True
    with torch.no_grad():
        twin = copy.copy(module)  # other threads may run the module itself
        twin._parameters = {**module._parameters, "bias": nn.Parameter(bias + 1)}
        with silenced(twin):
            moved = twin(x)
    return bool(((moved - y) - 1).abs().max() <= 1e-2 * y.abs().max().clamp(min=1.0))
