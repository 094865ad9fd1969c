"""What the tables of tiny diffusers models are written with.

A case is a pair: the options of the class, and the arguments of one forward. An argument that is a
function is called when the model is built, so that no tensor is made by an import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Options = dict[str, Any]
Case = tuple[Options, Options]
Maker = Callable[[], Any]


def noise(*shape: int) -> Maker:
    """Normal numbers."""
    return lambda: torch.randn(shape)


def share(*shape: int) -> Maker:
    """Numbers from 0 to 1."""
    return lambda: torch.rand(shape)


def whole(high: int, *shape: int) -> Maker:
    """Whole numbers from 1 up to ``high``, exclusive."""
    return lambda: torch.randint(1, high, shape)


def fixed(values: Any, kind: torch.dtype | None = None) -> Maker:
    """These numbers."""
    return lambda: torch.tensor(values, dtype=kind)


def filled(value: float, *shape: int) -> Maker:
    """One number everywhere."""
    return lambda: torch.full(shape, value)


def steps(length: int) -> Maker:
    """0, 1, 2 and so on."""
    return lambda: torch.arange(length)


def grid(*sizes: int) -> Maker:
    """The places of a grid, a row each."""
    return lambda: places(sizes).float()


def places(sizes: tuple[int, ...]) -> Tensor:
    """The places of a grid as whole numbers, a row each."""
    return torch.cartesian_prod(*map(torch.arange, (*sizes, 1)))[:, : len(sizes)]


def kept(length: int, *lengths: int, kind: torch.dtype = torch.bool) -> Maker:
    """A mask with a row of each of these lengths, padded at the end."""
    return lambda: (torch.arange(length) < torch.tensor(lengths)[:, None]).to(kind)


def causal(rows: int, length: int) -> Maker:
    """A mask for each row that hides the tokens to come."""
    return lambda: torch.ones(rows, length, length).tril()


def angles(*shape: int) -> Maker:
    """Rotations as a pair: cosines, sines."""

    def pair() -> tuple[Tensor, Tensor]:
        turns = torch.rand((*shape[:-1], shape[-1] // 2)).repeat_interleave(2, -1)
        return turns.cos(), turns.sin()

    return pair


def complex_angles(*shape: int) -> Maker:
    """Rotations as complex numbers of length 1."""
    return lambda: torch.polar(torch.ones(shape), torch.rand(shape))


def made(value: Any) -> Any:
    """The value with every function in it called."""
    if isinstance(value, dict):
        return {key: made(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(made(inner) for inner in value)
    return value() if callable(value) else value


# Widths: 48 of a stream, 20 of a text, 28 of a pooled text. Lengths: 15 of an image, 7 of a text.
HEADS: Options = {"num_attention_heads": 3, "attention_head_dim": 16}
AXES = (4, 6, 6)
JOINT: Options = HEADS | {"num_layers": 1, "num_single_layers": 1}
LATENTS: Options = {"in_channels": 4, "out_channels": 4}

TEXT: Options = {"encoder_hidden_states": noise(2, 7, 20)}
MASKED_TEXT: Options = TEXT | {"encoder_attention_mask": kept(7, 7, 4)}
POOLED: Options = {"pooled_projections": noise(2, 28)}
FLOW: Options = {"timestep": share(2)}
STEP: Options = {"timestep": fixed([30, 700])}
FLOAT_STEP: Options = {"timestep": fixed([30.0, 700.0])}
IDS: Options = {"img_ids": grid(1, 3, 5), "txt_ids": filled(0.0, 7, 3)}
TOKENS: Options = {"hidden_states": noise(2, 15, 8)}
IMAGE: Options = {"hidden_states": noise(2, 4, 6, 10)}
VIDEO: Options = {"hidden_states": noise(2, 4, 2, 6, 4)}
