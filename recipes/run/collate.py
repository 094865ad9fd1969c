"""Stack the features of several examples as tensors, those of texts padded to one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Collator:
    """Makes a batch: padded on the right for training, on the left for a decoder's prompts.

    Images, ``pixel_values``, have one size and are not padded.

    Attributes:
        pad: the token to pad with. Segments are padded with 0, labels with -100, which no loss
            counts. The attention mask hides padding.
        side: the side that is padded.
    """

    pad: int
    side: Literal["left", "right"] = "right"

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        if "pixel_values" in features[0]:
            return self._images(features)
        width = max(len(f["input_ids"]) for f in features)
        batch = {
            "input_ids": self._stack([f["input_ids"] for f in features], self.pad, width),
            "attention_mask": self._stack([[1] * len(f["input_ids"]) for f in features], 0, width),
        }  # each (B, n)
        if "token_type_ids" in features[0]:
            batch["token_type_ids"] = self._stack([f["token_type_ids"] for f in features], 0, width)
        if "labels" in features[0]:
            labels = [f["labels"] for f in features]
            whole = isinstance(labels[0], int)
            batch["labels"] = (
                torch.tensor(labels) if whole else self._stack(labels, IGNORED, width)
            )  # (B,) classes, or (B, n) tokens
        return batch

    def _images(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        pixels = [torch.as_tensor(f["pixel_values"], dtype=torch.float32) for f in features]
        batch = {"pixel_values": torch.stack(pixels)}  # (B, channels, height, width)
        if "labels" in features[0]:
            batch["labels"] = torch.tensor([f["labels"] for f in features])
        return batch

    def _stack(self, rows: Sequence[Sequence[int]], value: int, width: int) -> Tensor:
        filled = []
        for row in rows:
            padding = [value] * (width - len(row))
            filled.append([*padding, *row] if self.side == "left" else [*row, *padding])
        return torch.tensor(filled)
