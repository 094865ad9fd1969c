"""Say what PEFT's DoRA holds beside a LoRA: the magnitudes of a module's output features.

    PEFT    y = x W + b + (c - 1) x W + c s x A^T B^T       c = m / ||W + s A^T B^T||, by column
    here    the same for each port of the module (plugins/lora_dora.py), with its columns of m

PEFT has DoRA of embeddings and convolutions too, and none here does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SpliceError
from surgery.formats.foreign import Foreign
from surgery.formats.modules import Ports
from surgery.formats.peft_convolutions import convolution_at
from surgery.plugin import Port

MAGNITUDE = "lora_magnitude_vector"


def require_dora(adapter: Foreign, model: nn.Module, path: str, ports: Ports, bias: bool) -> None:
    """Raise unless a module's update has DoRA's form here.

    Raises:
        StoreError: it is no projection of attention, FFN or a linear layer, has no plain matrix, or
            is updated with a bias.
    """
    port = ports[0][1]
    for wrong, what in (
        (port.name == "rows", "an embedding"),
        (convolution_at(model, path) is not None, "a convolution"),
        (
            not port.weight,
            "a module without a plain matrix, such as a quantised one",
        ),
        (bias, "a projection with lora_bias=True, which PEFT rescales with the product"),
    ):
        if wrong:
            raise adapter.refuse(
                f"its config has use_dora=True, and it updates {path}: {what}. DoRA here is of "
                "linear projections, without a bias. Merge it with PEFT's merge_and_unload."
            )


def magnitudes(
    model: nn.Module, path: str, width: int, parts: Collection[tuple[Port, Any]],
    gather: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """Return m (out,) of a whole module; columns that no port updates have the norm of W's.

    Raises:
        SpliceError: the module is a convolution.
    """
    if convolution_at(model, path) is not None:
        raise SpliceError(
            f"this writer of PEFT's format has no DoRA of a convolution, as {path} is. Save in the "
            "own format: leave format= out."
        )
    first = next(iter(parts))
    found = torch.empty(width, dtype=first[1].magnitude.dtype)
    if sum(port.width for port, _ in parts) < width:
        weight = gather(model.get_parameter(first[0].weight)).to(found.dtype)
        found = torch.linalg.vector_norm(weight, dim=1 if first[0].transposed else 0)
    for port, module in parts:
        columns = range(width) if port.columns is None else port.columns
        found[list(columns)] = gather(module.magnitude)
    return found
