"""Find the sites that are one childless module, by the arguments that it is called with.

    norm         its parameters are vectors as wide as its input            ports: input, output
    position     it reads the positions 0, 1, 2, ... of the tokens          port: positions
    embedding    it reads the token ids that the model was called with      ports: ids, output

Only methods that name one of these kinds are offered such sites.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from surgery.interop import base_children, is_integer_tensor, leaves, tensors_equal
from surgery.locator.observation import Call, Observation
from surgery.plugin import HostPlan, Kind, Port, Site


def module_sites(model: nn.Module, observation: Observation, ids: list[Tensor]) -> list[Site]:
    """Return every module that is a site of its own.

    Args:
        ids: the tensors without floating point that the model was called with.
    """
    found = []
    for path, module in model.named_modules():
        call = observation.calls.get(path)
        if call is not None and path and not base_children(module):
            kind = _kind(module, call, ids)
            if kind:
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
    return Site(path, "", kind, width, ports, dtype=weight.dtype, device=weight.device, host=plan)


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
    for x in filter(is_integer_tensor, given):
        if x.shape[-1] < 2 or _is_constant(x):
            continue
        if any(tensors_equal(x, each) for each in ids):
            return "embedding" if own else None
        if not x.is_meta and bool((x[..., 1:] - x[..., :-1] == 1).all()):
            return "position"
    return None
