"""Find the sites that are one childless module, by the arguments that it is called with.

    norm         its parameters are vectors as wide as its input            ports: input, output
    position     it reads the positions 0, 1, 2, ... of the tokens          port: positions
    embedding    it reads the token ids that the model was called with      ports: ids, rows, output
    convolution  it convolves, and reads more than one position             ports: input, output

Only methods that name one of these kinds are offered such sites, and those that are given them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from surgery.interop import base_children, is_integer_tensor, leaves, tensors_equal
from surgery.locator.run_record import Call, Observation, floats_in
from surgery.patterns import value
from surgery.plugin import HostPlan, Kind, Port, Site

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def module_sites(model: nn.Module, observation: Observation, ids: list[Tensor]) -> list[Site]:
    """Return every module that is a site of its own.

    Args:
        ids: the tensors without floating point that the model was called with.
    """
    found: list[Site] = []
    calls = {str(n.target): n for n in observation.graph.find_nodes(op="call_module")}
    for path, module in model.named_modules():
        call = observation.calls.get(path)
        if call is None or not path or base_children(module):
            continue
        if isinstance(module, _CONVOLUTIONS):
            site = _convolution(path, module, call, calls.get(path))
            found += [site] if site else []
        elif kind := _kind(module, call, ids):
            found.append(_site(kind, path, module, call))
    return found


def _site(kind: Kind, path: str, module: nn.Module, call: Call) -> Site:
    own = module.parameters(recurse=False)  # not those of what is spliced in
    weight = next((p for p in own if p.is_floating_point()), torch.zeros(()))
    plan = HostPlan(path, frozenset(), call.args, call.kwargs)
    width = weight.shape[-1] if weight.dim() else 0
    names = {"norm": ("input", "output"), "embedding": ("ids", "output")}
    ports = {}
    for name in names.get(kind, ("positions",)):
        bias = f"{path}.bias" if name == "output" and _has_bias(module) else ""
        ports[name] = Port(name, width, None, bias=bias)
    if kind == "embedding" and isinstance(module, nn.Embedding) and module.max_norm is None:
        ports["rows"] = Port("rows", width, module.num_embeddings, f"{path}.weight", module=path)
    return Site(path, "", kind, width, ports, dtype=weight.dtype, device=weight.device, host=plan)


def _convolution(path: str, module: Any, call: Call, node: fx.Node | None) -> Site | None:
    """Return the site of a convolution whose call is ``node``; None if it is a projection.

    It is none either if it is not plain: a subclass may compute another weight, or pad its input,
    so the first example is compared.
    """
    y = value(node)
    given, weight = floats_in((call.args, call.kwargs))[:1], module.weight
    if y is None or not given or given[0].dim() != weight.dim() or set(weight.shape[2:]) == {1}:
        return None
    if not given[0].is_meta and not _is_plain(module, given[0][:1], y[:1]):
        return None
    plan = HostPlan(path, frozenset(), call.args, call.kwargs)
    bias = f"{path}.bias" if module.bias is not None else ""
    width, reads = weight.shape[0], weight[0].numel()
    ports = {
        "input": Port("input", given[0].shape[1], None),
        "output": Port(
            "output", width, reads, f"{path}.weight", bias, transposed=True, module=path
        ),
    }
    return Site(path, "", "convolution", width, ports, dtype=weight.dtype, device=y.device,
                host=plan)  # fmt: skip


def _is_plain(module: Any, x: Tensor, y: Any) -> bool:
    """Whether a convolution of these settings, with this weight, makes y of x."""
    kind = next(each for each in _CONVOLUTIONS if isinstance(module, each))
    names = "in_channels out_channels kernel_size stride padding dilation groups padding_mode"
    settings = {name: getattr(module, name) for name in names.split()}
    plain = kind(**settings, bias=module.bias is not None, device="meta")
    own = {"weight": module.weight, "bias": module.bias}
    with torch.no_grad():
        again = functional_call(plain, {n: t for n, t in own.items() if t is not None}, (x,))
    return again.shape == y.shape and torch.allclose(again, y, rtol=5e-2, atol=1e-5)


def _has_bias(module: nn.Module) -> bool:
    bias = getattr(module, "bias", None)
    return isinstance(bias, nn.Parameter) and bias.dim() == 1


def _is_constant(x: Tensor) -> bool:
    """Whether all numbers are equal, as in a mask of an example: neither tokens nor positions."""
    return not x.is_meta and bool((x == x.flatten()[0]).all())


def _kind(module: nn.Module, call: Call, ids: list[Tensor]) -> Kind | None:
    """Return the kind of site that a childless module is, or None."""
    given = [x for x in leaves((call.args, call.kwargs)) if isinstance(x, Tensor)]
    own = list(module.parameters(recurse=False))
    widths = {p.numel() for p in own}
    if own and all(p.dim() == 1 for p in own) and len(widths) == 1:
        reads = next((x for x in given if x.is_floating_point() and x.dim() > 1), None)
        return "norm" if reads is not None and reads.shape[-1] in widths else None
    found: list[Kind] = []
    for x in filter(is_integer_tensor, given):
        if x.shape[-1] < 2 or _is_constant(x):
            continue
        if any(tensors_equal(x, each) for each in ids):
            found.append("embedding")
        elif not x.is_meta and bool((x[..., 1:] - x[..., :-1] == 1).all()):
            found.append("position")
    if "position" in found:  # some are given the tokens, too, for their number
        return "position"
    return "embedding" if found and own else None
