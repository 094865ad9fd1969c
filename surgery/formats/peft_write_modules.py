"""Write LoRA and (IA)3 as PEFT has them: one update for each module, not for each port.

one port, or ports that share A    A (r, in), and B (out, r) with the columns of each port
ports with an A of their own       A stacked (r_1 + r_2, in), B with their blocks; the same sum
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SpliceError
from surgery.formats.peft_base import short_names, short_parameters
from surgery.formats.peft_convolutions import convolution_at, kernels_of
from surgery.formats.peft_dora import MAGNITUDE, magnitudes
from surgery.formats.peft_lora import A_B_OF_ROWS, PREFIX
from surgery.formats.peft_parameters import paths_of_wrappers, stack_of
from surgery.plugin import Port
from surgery.splicer import Report

Gather = Callable[[Tensor], Tensor]
Parts = list[tuple[Port, Any]]  # the ports of one module with the inserted modules
Files = tuple[dict[str, Any], dict[str, Tensor]]


def lora_files(model: nn.Module, report: Report, gather: Gather) -> Files:
    """Return config and tensors of a LoRA, or a DoRA.

    Raises:
        SpliceError: a projection is no module with a matrix of its own.
    """
    method: Any = report.methods[0]
    dora = method.name == "dora"
    tensors: dict[str, Tensor] = {}
    ranks, scales = {}, {}
    by_module = _by_module(model, report)
    stacks = [path for path, (_, parts) in by_module.items() if parts[0][0].stacked]
    wrappers = paths_of_wrappers(model, stacks)
    for path, (width, parts) in by_module.items():
        if parts[0][0].name == "rows":
            rows = parts[0][1]
            ranks[path], scales[path] = len(rows.a), float(rows.scale)
            both = gather(rows.a), gather(rows.b).T
            tensors |= {f"{PREFIX}{path}.{n}": x for n, x in zip(A_B_OF_ROWS, both, strict=True)}
            continue
        if parts[0][0].stacked:
            (port, stack), wrapper = parts[0], wrappers[path]
            ranks[path], scales[path] = stack.a.shape[1], float(stack.scale)
            a, b = stack_of(model, path, port, gather(stack.a), gather(stack.b))
            tensors |= {f"{PREFIX}{wrapper}.lora_A.weight": a,
                        f"{PREFIX}{wrapper}.lora_B.weight": b}  # fmt: skip
            continue
        a, b, bias, scales[path] = _joined(parts, width, gather)
        if (kernel := convolution_at(model, path)) is not None:
            a, b = kernels_of(kernel, path, a, b)
        ranks[path] = len(a)
        tensors[f"{PREFIX}{path}.lora_A.weight"] = a
        tensors[f"{PREFIX}{path}.lora_B.weight"] = b
        if bias is not None:
            tensors[f"{PREFIX}{path}.lora_B.bias"] = bias
        if dora:
            tensors[f"{PREFIX}{path}.{MAGNITUDE}"] = magnitudes(model, path, width, parts, gather)
    alphas = {
        path: _number(scale * (math.sqrt(ranks[path]) if method.rslora else ranks[path]))
        for path, scale in scales.items()
    }
    rank, rank_pattern = _commonest(ranks)
    alpha, alpha_pattern = _commonest(alphas)
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": _dropout(method, stacks),
        "target_modules": short_names(model, by_module.keys() - {*stacks}),
        "target_parameters": short_parameters(model, stacks) or None,
        "fan_in_fan_out": _stored_in_out(by_module),
        "bias": "none",
        "lora_bias": not dora and method.bias,
        "use_rslora": method.rslora,
        "use_dora": dora,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }, tensors


def _dropout(method: Any, stacks: list[str]) -> float:
    """Return the dropout; PEFT has none beside updates of parameters, and inference needs none."""
    if stacks and method.dropout:
        warnings.warn(
            f"PEFT has no dropout in an adapter of {stacks[0]}, so dropout={method.dropout} of the "
            "other modules is left out. It has a part in training alone.",
            stacklevel=2,
        )
    return 0.0 if stacks else float(method.dropout)


def ia3_files(model: nn.Module, report: Report, gather: Gather) -> Files:
    """Return config and tensors of (IA)3.

    Raises:
        SpliceError: a projection is no module with a matrix of its own.
    """
    tensors, inputs = {}, []
    by_module = _by_module(model, report)
    for path, (width, parts) in by_module.items():
        if parts[0][0].name == "output":
            inputs.append(path)
            scale = gather(parts[0][1].scale)[None]
        else:
            scale = torch.ones(width, 1, dtype=parts[0][1].scale.dtype)
            for port, module in parts:
                scale[_columns(port, width), 0] = gather(module.scale)
        tensors[f"{PREFIX}{path}.ia3_l"] = scale
    return {
        "peft_type": "IA3",
        "target_modules": short_names(model, by_module),
        "feedforward_modules": short_names(model, inputs),
        "fan_in_fan_out": _stored_in_out(by_module),
    }, tensors


def _by_module(model: nn.Module, report: Report) -> dict[str, tuple[int, Parts]]:
    """Return the parts of each updated module, with the number of features that it makes."""
    found: dict[str, tuple[int, Parts]] = {}
    for i in report.inserted:
        port = i.site.ports[i.edit.port]
        if port.stacked:
            found[port.weight] = port.width, [(port, model.get_submodule(i.path))]
            continue
        whole = port.weight and model.get_parameter(port.weight).dim() == 2
        if not port.module or not (not port.weight or whole or convolution_at(model, port.module)):
            raise SpliceError(
                f"PEFT's format names modules, and what {i.path} updates is no module with one "
                "matrix. Save in the own format: leave format= out."
            )
        alike = [p for p in i.site.ports.values() if p.module == port.module]
        width = port.width if port.columns is None else sum(p.width for p in alike)
        if port.weight:  # more than its ports here, if another site has some of its features
            width = model.get_parameter(port.weight).shape[0 if port.transposed else 1]
        found.setdefault(port.module, (width, []))[1].append((port, model.get_submodule(i.path)))
    return found


def _stored_in_out(by_module: Mapping[str, tuple[int, Parts]]) -> bool:
    """Whether a weight is stored as (in, out), which PEFT calls ``fan_in_fan_out``."""
    ports = [port for _, parts in by_module.values() for port, _ in parts]
    return any(p.weight and not (p.transposed or p.stacked or p.name == "rows") for p in ports)


def _joined(
    parts: Parts, width: int, gather: Gather
) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """Return A (r, in), B (out, r), c (out,) or None, and the scale of a whole module."""
    if isinstance(parts[0][1].a, nn.Module):  # a convolution, with its one port
        kernel = parts[0][1]
        bias = None if kernel.bias is None else gather(kernel.bias)
        return gather(kernel.a.weight), gather(kernel.b).T, bias, float(kernel.scale)
    shared = all(module.a is parts[0][1].a for _, module in parts)
    factors = [(gather(module.a), gather(module.b)) for _, module in parts]
    scale = float(parts[0][1].scale)
    shared |= all(torch.equal(a, factors[0][0]) and m.scale == scale
                  for (a, _), (_, m) in zip(factors, parts, strict=True))  # fmt: skip
    a = factors[0][0] if shared else torch.cat([a for a, _ in factors])
    b = torch.zeros(width, len(a), dtype=a.dtype)
    no_bias = getattr(parts[0][1], "bias", None) is None
    bias = None if no_bias else torch.zeros(width, dtype=a.dtype)
    start = 0
    for (port, module), (own, out) in zip(parts, factors, strict=True):
        ratio, columns = module.scale / scale, _columns(port, width)
        rows = slice(0, None) if shared else slice(start, start + len(own))
        b[columns, rows] = out.T if ratio == 1 else out.T * ratio
        if bias is not None:
            own_bias = gather(module.bias)
            bias[columns] = own_bias if ratio == 1 else own_bias * ratio
        start += len(own)
    return a, b, bias, scale


def _columns(port: Port, width: int) -> list[int]:
    return list(range(width)) if port.columns is None else list(port.columns)


def _commonest(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the commonest value, and a pattern for each path that has another."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {f"^{path}": value for path, value in values.items() if value != common}


def _number(value: float) -> int | float:
    """Return a whole number as an int, for readers that take no other."""
    near = round(value)
    return near if math.isclose(value, near, rel_tol=1e-12) else value
