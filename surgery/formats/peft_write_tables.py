"""Write prefixes and prompts as PEFT has them: one table (peft_prompts.py has its layout)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SpliceError
from surgery.formats.peft_base import task_of
from surgery.formats.peft_prompts import TABLE
from surgery.splicer import Inserted, Report

Gather = Callable[[Tensor], Tensor]
Files = tuple[dict[str, Any], dict[str, Tensor]]


def prefix_files(model: nn.Module, report: Report, gather: Gather) -> Files:
    """Return config and table of a prefix.

    Raises:
        SpliceError: it has a gate or a dropout, moves no positions, leaves layers out, or has
            layers of different shapes.
    """
    method: Any = report.methods[0]
    layers = [i for i in report.inserted if i.site.kind == "attention"]
    shapes = {(i.site.kv_heads, i.site.head_width, i.site.value_width) for i in layers}
    every = getattr(getattr(model, "config", None), "num_hidden_layers", len(layers))
    for wrong, what in (
        (not method.shift, "shift=False: PEFT gives real tokens the positions P, P + 1, ..."),
        (method.gate, "gate=True"),
        (any(i.site.cross for i in layers), "a prefix in cross-attention"),
        (len(layers) != every, f"a prefix in {len(layers)} of {every} layers"),
        (len(shapes) > 1 or any(d != v for _, d, v in shapes), "layers of different shapes"),
    ):
        if wrong:
            raise _no_place(report, what)
    pairs = []
    for i in layers:
        state = model.get_submodule(i.path).plain_state()  # type: ignore[operator]
        pairs += [gather(state[name]).transpose(0, 1).flatten(1) for name in ("keys", "values")]
    groups, width, _ = shapes.pop()
    return {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": method.length,
        "token_dim": groups * width,
        "num_layers": len(layers),
        "num_attention_heads": groups,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
    }, {TABLE: torch.cat(pairs, -1).contiguous()}


def prompt_files(model: nn.Module, report: Report, gather: Gather) -> Files:
    """Return config and table of a prompt.

    Raises:
        SpliceError: its rows stand in front of a decoder that reads an encoder, or are cut from the
            outputs of an encoder, which PEFT does not do.
    """
    method: Any = report.methods[0]
    roles = {i.site.role for i in report.inserted if i.site.kind == "trunk"}
    if roles - {""} and method.sequence != "encoder":
        raise _no_place(report, f"sequence={method.sequence!r}")
    alone = any(i.site.kind == "attention" for i in report.inserted)
    if method.cut and not alone and task_of(model) not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise _no_place(report, "cut=True: PEFT leaves the rows in the outputs of an encoder")
    module = model.get_submodule(_owner(model, report).path)
    prompt: Any = next(m for m in module.modules() if hasattr(m, "rows") and hasattr(m, "encoder"))
    with torch.no_grad():
        table = gather(prompt())
    config = getattr(model, "config", None)
    return {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": method.length,
        "token_dim": table.shape[-1],
        "num_layers": getattr(config, "num_hidden_layers", None),
        "num_attention_heads": getattr(config, "num_attention_heads", None),
        "num_transformer_submodules": 1,
    }, {TABLE: table}


def _owner(model: nn.Module, report: Report) -> Inserted:
    """Return the inserted module that owns the rows; the others refer to them."""
    return next(
        i
        for i in report.inserted
        if any(n.endswith("rows") for n, _ in model.get_submodule(i.path).named_parameters())
    )


def _no_place(report: Report, what: str) -> SpliceError:
    return SpliceError(
        f"PEFT's format has no place for {report.methods[0].name!r} with {what} (splice "
        f"{report.name!r}). Save in the own format: leave format= out."
    )
