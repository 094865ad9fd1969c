"""Write prefixes and prompts as PEFT has them: one table (peft_prompts.py has its layout)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SpliceError
from surgery.formats.peft_base import task_of
from surgery.formats.peft_prompts import TABLE, places_of_layers
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
    behind = task_of(model) == "SEQ_2_SEQ_LM"
    every = _layers(getattr(model, "config", None), behind) or len(layers)
    for wrong, what in (
        (not method.shift, "shift=False: PEFT gives real tokens the positions P, ..."),
        (method.gate, "gate=True"),
        (any(i.site.cross for i in layers), "a prefix in cross-attention"),
        (behind and not all(i.site.causal for i in layers), "a prefix in an encoder"),
        (len(layers) != every, f"a prefix in {len(layers)} of {every} layers"),
        (len(shapes) > 1 or any(d != v for _, d, v in shapes), "layers of different shapes"),
    ):
        if wrong:
            raise _no_place(report, what)
    groups, width, _ = shapes.pop()
    own = [_pair(model, i, gather) for i in layers]
    pairs = [torch.zeros_like(own[0]) for _ in own]
    places = places_of_layers(len(own), behind)
    for place, pair in zip(places, own, strict=True):
        pairs[place] = pair
    for layer, place in enumerate(places):
        if not torch.equal(pairs[place], own[layer]):
            raise _no_place(report, f"another prefix in layer {layer} than in the layer whose "
                            "place in the table it shares behind an encoder")  # fmt: skip
    return {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": method.length,
        "token_dim": groups * width,
        "num_layers": len(layers),
        "num_attention_heads": groups,
        "num_transformer_submodules": 1 + behind,
        "prefix_projection": False,
    }, {TABLE: torch.cat(pairs, -1).contiguous()}


def _layers(config: Any, behind: bool) -> int:
    """Return how many layers a model has that a prefix stands in; 0 if its configuration lacks it.

    Args:
        behind: whether it is the decoder's, behind an encoder of maybe another depth.
    """
    names = ("num_decoder_layers", "decoder_layers") if behind else ()
    found = (getattr(config, name, None) for name in (*names, "num_hidden_layers"))
    return next((n for n in found if isinstance(n, int)), 0)


def _pair(model: nn.Module, inserted: Inserted, gather: Gather) -> Tensor:
    """Return the keys and values of one layer, side by side: (P, 2 G d)."""
    state = model.get_submodule(inserted.path).plain_state()  # type: ignore[operator]
    both = [gather(state[name]).transpose(0, 1).flatten(1) for name in ("keys", "values")]
    return torch.cat(both, -1)


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
