"""Translate LoRA and (IA)3 as PEFT saves them.

    PEFT    y = x W + b + s (x A^T B^T + c)         A (r, in), B (out, r) of a whole module
    here    the same for each port of the module, with the columns of B and c that are the port's

A module that makes several ports, a fused projection, has one A for all of them here too. The rows
of an embedding (V, D) are a map of V features: A (r, V), B (D, r), under other names.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from surgery.errors import shown
from surgery.formats.foreign import Foreign, Translation, option, require_shape
from surgery.formats.modules import Place, Ports, at_ports, out_width, places
from surgery.formats.peft_announced import require_announced
from surgery.formats.peft_config import is_positive, matched, pattern
from surgery.formats.peft_convolutions import (
    convolution_at,
    kernel_shapes,
    kernels_here,
    require_convolution,
)
from surgery.formats.peft_dora import MAGNITUDE, require_dora
from surgery.formats.peft_keys import Keys, base_tensors_of, rows_of, sorted_keys
from surgery.formats.peft_parameters import parameter_here, parameter_shapes, require_parameters
from surgery.formats.peft_targets import require_targets
from surgery.plugin import Port, Sites

PREFIX = "base_model.model."
A_B_OF_ROWS = ("lora_embedding_A", "lora_embedding_B")


def lora(adapter: Foreign, model: nn.Module, sites: Sites) -> Translation:
    """Return what a LoRA of PEFT becomes in this model.

    Raises:
        StoreError: a module is not there or has other widths, or an option has no place here.
    """
    keys = sorted_keys(adapter, model, PREFIX)
    ports = places(adapter, keys.modules, sites)
    rank, alpha = option(adapter, "r", 8, int), option(adapter, "lora_alpha", 8, int, float)
    ranks, alphas = pattern(adapter, "rank_pattern"), pattern(adapter, "alpha_pattern")
    bias, dora = (option(adapter, name, False, bool) for name in ("lora_bias", "use_dora"))
    require_parameters(adapter, model)

    def needed(path: str, made: Ports) -> dict[str, tuple[int, ...]]:
        wanted, end = _wanted(model, path, made, matched(ranks, path, rank), bias, dora)
        return {f"{PREFIX}{path}.{what}{end}": shape for what, shape in wanted.items()}

    values: dict[Place, dict[str, Tensor]] = {}
    own: dict[str, tuple[int, float]] = {}
    for path, parts in keys.modules.items():
        r, numerator = matched(ranks, path, rank), matched(alphas, path, alpha)
        if not is_positive(r) or type(r) is not int:
            raise adapter.refuse(f"the rank of {path} is {shown(r)}.")
        if not is_positive(numerator):
            raise adapter.refuse(f"lora_alpha of {path} is {shown(numerator)}.")
        own[ports[path][0][1].module or path] = r, numerator
        whole = _of_module(adapter, model, path, parts, ports[path], r, bias, dora)
        for site, port in ports[path]:
            values[(*site.identity, port.name)] = _of_port(whole, port)
    require_targets(adapter, keys, model, sites, needed)
    require_announced(adapter, keys, model, PREFIX)
    options = ranks_and_alphas(adapter, own) | {
        "rslora": option(adapter, "use_rslora", False, bool),
        "dropout": float(option(adapter, "lora_dropout", 0.0, int, float)),
        "fused": any(len(found) > 1 for found in ports.values()),
    }
    across = any(getattr(convolution_at(model, p), "groups", 1) > 1 for p in ports)
    options |= {} if dora else {"bias": bias, "across_groups": across}
    found = at_ports("dora" if dora else "lora", options, sites, values)
    return _with_base(adapter, model, keys, found)


def _of_module(
    adapter: Foreign, model: nn.Module, path: str, parts: Mapping[str, str], ports: Ports,
    rank: int, bias: bool, dora: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """Return A (r, in), B (r, out) and c (out,) of a module, by the names that they have here."""
    kernel, (site, port) = convolution_at(model, path), ports[0]
    if kernel is not None:
        require_convolution(adapter, path, kernel, rank)
    if dora:
        require_dora(adapter, model, path, ports, bias)
    wanted, end = _wanted(model, path, ports, rank, bias, dora)
    why = f"r is {rank}, and {path} maps {port.in_width} to {out_width(ports)} features"
    found = {
        what: require_shape(adapter, parts.get(what, f"{PREFIX}{path}.{what}{end}"), shape, why)
        for what, shape in wanted.items()
    }
    if parts.keys() - wanted.keys():
        raise adapter.refuse(f"{min(parts[what] for what in parts.keys() - wanted.keys())} is "
                             "there although its config does not say so.")  # fmt: skip
    a, b = (found[what] for what in list(wanted)[:2])
    if path == port.weight:
        return parameter_here(model, path, port, a, b)
    projects = site.kind != "convolution"
    whole = {"a": a, "b": b.T} if kernel is None else kernels_here(kernel, a, b, projects)
    whole |= {"magnitude": found[MAGNITUDE]} if dora else {}
    return whole | ({"bias": found["lora_B.bias"]} if bias else {})


def _wanted(
    model: nn.Module, path: str, ports: Ports, rank: int, bias: bool, dora: bool
) -> tuple[dict[str, tuple[int, ...]], str]:
    """Return the shapes of a module's A, B and c by what they are, and how their names end."""
    port, kernel, out = ports[0][1], convolution_at(model, path), out_width(ports)
    assert port.in_width is not None
    named = A_B_OF_ROWS if port.name == "rows" and path != port.weight else ("lora_A", "lora_B")
    shapes: Any = (rank, port.in_width), (out, rank)
    if path == port.weight:
        shapes, bias = parameter_shapes(model, path, port, rank), False
    elif kernel is not None:
        shapes = kernel_shapes(kernel, rank)
    wanted: dict[str, tuple[int, ...]] = dict(zip(named, shapes, strict=True))
    wanted |= {"lora_B.bias": (out,)} if bias else {}
    wanted |= {MAGNITUDE: (out,)} if dora else {}
    return wanted, "" if named == A_B_OF_ROWS else ".weight"


def _of_port(whole: Mapping[str, Tensor], port: Port) -> dict[str, Tensor]:
    """Return the part of a module's tensors that belongs to one port."""
    if port.columns is None:
        return dict(whole)
    columns = list(port.columns)
    return {name: x if name.startswith("a") else x[..., columns] for name, x in whole.items()}


def ranks_and_alphas(adapter: Foreign, own: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """Return the options of ranks and numerators: the commonest, and the others by module."""
    options: dict[str, Any] = {}
    for i, (one, several) in enumerate((("rank", "ranks"), ("alpha", "alphas"))):
        values = {path: pair[i] for path, pair in own.items()}
        options[one] = Counter(values.values()).most_common(1)[0][0]
        options[several] = {} if len(set(values.values())) == 1 else values
        if len(options[several]) > 10_000:
            raise adapter.refuse(f"it has {len(values):,} modules of different {several}.")
    return options | {"alpha": float(options["alpha"])}


def ia3(adapter: Foreign, model: nn.Module, sites: Sites) -> Translation:
    """Return what (IA)3 of PEFT becomes in this model.

    Raises:
        StoreError: a module is not there or has another width, or is rescaled at the side on which
            nothing is rescaled here.
    """
    keys = sorted_keys(adapter, model, PREFIX)
    ports = places(adapter, keys.modules, sites)

    def needed(path: str, made: Ports) -> dict[str, tuple[int, ...]]:
        return {f"{PREFIX}{path}.ia3_l": _scales(made)}

    values: dict[Place, dict[str, Tensor]] = {}
    for path, parts in keys.modules.items():
        key, (_, first) = parts.get("ia3_l", f"{PREFIX}{path}.ia3_l"), ports[path][0]
        shape = _scales(ports[path])
        side = "input" if first.name == "output" else "output"
        why = f"the {side} of {path}, a projection to the port {first.name!r}, is rescaled here"
        scale = require_shape(adapter, key, shape, why).flatten()
        for site, port in ports[path]:
            columns = None if first.name == "output" else port.columns
            own = scale if columns is None else scale[list(columns)]
            values[(*site.identity, port.name)] = {"scale": own}
    require_targets(adapter, keys, model, sites, needed)
    require_announced(adapter, keys, model, PREFIX)
    return _with_base(adapter, model, keys, at_ports("ia3", {}, sites, values))


def _scales(ports: Ports) -> tuple[int, int]:
    """Return the shape of the vector that rescales a module: its input's, or its output's."""
    first = ports[0][1]
    width = first.in_width if first.name == "output" else out_width(ports)
    assert width is not None
    return (1, width) if first.name == "output" else (width, 1)


def _with_base(adapter: Foreign, model: nn.Module, keys: Keys, found: Translation) -> Translation:
    """Return a translation with what the adapter brings of the base."""
    kept, rows = base_tensors_of(adapter, keys, model), rows_of(adapter, keys, model)
    return dataclasses.replace(found, kept=kept, rows=rows)
