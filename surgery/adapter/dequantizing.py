"""Put a plain linear layer in the place of a quantised one, so that an update can be folded in.

    W = P(1) - P(0),  b = P(0)        P: the layer, 1: the unit vectors as rows

This reads the matrix that the layer computes with, whatever holds it: bitsandbytes, torchao,
quanto, a packed layer of one's own. What the layer does beside, such as rounding its input to eight
bits, is not in W: the difference is measured on random inputs, and reported.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from surgery.errors import SpliceError

_BOUND = 0.1  # relative; a layer that rounds its input to 8 bits differs by about 0.01
_ROWS = 1024  # unit vectors at once


def dequantized(
    layer: nn.Module, width: int, path: str, dtype: torch.dtype
) -> tuple[nn.Linear, float]:
    """Return a linear layer that computes what ``layer`` does, and how far the two are apart.

    Args:
        width: the width of the input.
        dtype: that of the input in the model. A layer may hold whole numbers alone.

    Returns:
        the layer, in the dtype that the quantised one returns, and |P(x) - x W - b| / |P(x)| for
        random x.

    Raises:
        SpliceError: the layer is not linear, or it rounds its inputs to a fixed range, which a
            unit vector may leave.
    """
    held = [*layer.parameters(), *layer.buffers()]
    device = held[0].device if held else torch.device("cpu")
    with torch.no_grad():
        shift = layer(torch.zeros(1, width, dtype=dtype, device=device))
        rows = [_matrix_rows(layer, range(at, min(at + _ROWS, width)), width, shift)
                for at in range(0, width, _ROWS)]  # fmt: skip
        plain = nn.Linear(width, shift.shape[-1], getattr(layer, "bias", None) is not None,
                          device=device, dtype=shift.dtype)  # fmt: skip
        plain.weight.copy_(torch.cat(rows).T)
        if plain.bias is not None:
            plain.bias.copy_(shift[0])
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(64, width, generator=generator, dtype=torch.float32, device=device)
        expected = layer(x.to(dtype)).float()
        error = float((plain(x.to(plain.weight.dtype)).float() - expected).norm() / expected.norm())
    if not error < _BOUND:
        raise SpliceError(
            f"{path} cannot be dequantised: a matrix read from it differs by {error:.2g} of its "
            "output: it is no linear layer, or rounds its inputs to a fixed range. Nothing has "
            "changed; leave its module spliced (partial=True)."
        )
    return plain.requires_grad_(False), error


def _matrix_rows(layer: nn.Module, some: Iterable[int], width: int, shift: Tensor) -> Tensor:
    """Return these rows of the matrix W (in, out) of a layer."""
    ones = torch.eye(width, dtype=shift.dtype, device=shift.device)[list(some)]
    found: Tensor = layer(ones) - shift
    return found
