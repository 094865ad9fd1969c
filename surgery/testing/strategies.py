"""Hypothesis strategies for authors of methods: small models, batches for them, and their sites.

    @given(data=st.data())
    def test_a_law(data):
        model = data.draw(surgery.testing.models())
        batch = data.draw(surgery.testing.batches(model))
        surgery.splice(model, MyMethod(), at=data.draw(surgery.testing.sites(model)))
        ...

Hypothesis is imported when one of them is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import surgery
from surgery.plugin import Sites
from surgery.testing.shapes import PAD, SHAPES, VOCABULARY, make_model

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def models(shapes: Sequence[str] = SHAPES) -> SearchStrategy[nn.Module]:
    """Draw a small model with random weights, in evaluation mode.

    Args:
        shapes: the names of ``surgery.testing.SHAPES`` and ``MORE_SHAPES`` to choose from.

    It has 1 to 4 heads of width 4 or 8, and 1 or 2 layers. It shrinks to one head and one layer of
    the first shape.
    """
    from hypothesis import strategies as st

    def built(shape: str, heads: int, head_width: int, layers: int, seed: int) -> nn.Module:
        made: nn.Module = make_model(shape, heads * head_width, heads, layers, seed)
        return made

    return st.builds(
        built,
        st.sampled_from(list(shapes)),
        st.sampled_from([1, 2, 4]),
        st.sampled_from([4, 8]),
        st.integers(1, 2),
        st.integers(0, 3),
    )


def batches(model: nn.Module, rows: int = 3, length: int = 8) -> SearchStrategy[dict[str, Tensor]]:
    """Draw the keyword arguments of a call: token ids and a mask of padding, or images.

    Args:
        model: a model that :func:`models` has drawn.
        rows: the most rows of a batch.
        length: the most tokens of a row; shorter rows are padded on the right, or, for a decoder,
            on either side.
    """
    from hypothesis import strategies as st

    if "pixel_values" in str(getattr(model, "main_input_name", "")):
        seeds, counts = st.integers(0, 9), st.integers(1, rows)
        return st.builds(_images, seeds, counts)
    config: Any = model.config
    decoder = hasattr(model, "generate") and not config.is_encoder_decoder
    tokens = st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=length)
    sides = st.booleans() if decoder else st.just(False)
    both = bool(config.is_encoder_decoder)
    return st.builds(_padded, st.lists(tokens, min_size=1, max_size=rows), sides, st.just(both))


def sites(model: nn.Module, kinds: Sequence[str] = ("attention", "ffn")) -> SearchStrategy[Sites]:
    """Draw one or more of the sites of a model, for ``at=``; it shrinks to one.

    Args:
        kinds: the kinds to choose from, such as ``("block",)``; a selection iterates over attention
            and FFN alone, and holds the others for methods of their kinds.
    """
    from hypothesis import strategies as st

    found = surgery.locate(model)
    chosen = [site for site in [*found, *found.others] if site.kind in kinds]
    some = st.lists(st.sampled_from(range(len(chosen))), min_size=1, unique=True)

    def picked(numbers: list[int]) -> Sites:
        own = [chosen[i].identity for i in sorted(numbers)]
        made: Sites = found.where(lambda site: site.identity in own)
        return made

    return some.map(picked)


def _padded(rows: list[list[int]], left: bool, decodes: bool) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    filled, mask = [], []
    for row in rows:
        gap = longest - len(row)
        before, behind = (gap, 0) if left else (0, gap)
        filled.append([PAD] * before + row + [PAD] * behind)
        mask.append([0] * before + [1] * len(row) + [0] * behind)
    batch = {"input_ids": torch.tensor(filled), "attention_mask": torch.tensor(mask)}
    return batch | ({"decoder_input_ids": batch["input_ids"][:, :1]} if decodes else {})


def _images(seed: int, count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(count, 3, 16, 16, generator=generator)}
