"""Call the ``fold`` of an inserted module, and check what it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SpliceError
from surgery.interop import onloaded
from surgery.plugin import Edit, Foldable, FoldableInput
from surgery.splicer import Inserted


def protocol_of(edit: Edit) -> type:
    """Return the protocol that a module needs to be folded at this edit."""
    return FoldableInput if edit.verb == "feed" else Foldable


def call_fold(
    inserted: Inserted,
    module: nn.Module,
    fold: Callable[..., Any],
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return ``fold(weight, bias)`` of an inserted module, checked to have the same shapes."""
    where = f"method {inserted.method.name!r} at {inserted.site.path}"
    try:
        with torch.no_grad(), onloaded([module]):
            result = fold(weight, bias)
            new_weight, new_bias = result
            pairs = ((new_weight, weight), (new_bias, bias))
            fits = all(
                getattr(new, "shape", None) == getattr(old, "shape", None) for new, old in pairs
            )
    except Exception as error:  # a plugin's code may raise anything
        raise SpliceError(
            f"{where}: its fold fails ({type(error).__name__}: {error}). Nothing has changed. fold "
            "is given W (in, out) and b, or None, and returns both; a module that folds a bias of "
            "its own into b has needs_bias = True."
        ) from error
    if not fits:
        raise SpliceError(
            f"{where}: its fold gives other shapes than the weight and bias that it was given. "
            "Nothing has changed. Return W (in, out) and b in their shapes, and None for None."
        )
    return new_weight, new_bias


def reads_bias(inserted: Inserted) -> bool:
    """Whether a module reads the bias of a projection (a read such as ``query.bias``)."""
    return any(read.endswith(".bias") for read in inserted.edit.reads)
