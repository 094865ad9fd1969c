"""The base class of tasks that assign a class to an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

import surgery
from surgery import Example, Features, RecipeError, TaskKind


@dataclass(frozen=True)
class ImageClassification(surgery.Task):
    """A task of classes. An example has ``image``, ``label`` (a number) and ``name``, for people.

    An image is an array of bytes, of height and width, or of height, width and 3 colours. The
    image processor of the base scales it; it says by the number of its means whether the base sees
    1 channel or 3. A derived class writes ``splits`` and ``labels``. The score is ``accuracy``,
    unless it writes ``score`` too.
    """

    kind: ClassVar[TaskKind] = "image_classifier"
    metric: ClassVar[str] = "accuracy"

    def encode(self, example: Example, tokenizer: Any) -> Features:
        image = with_channels(example["image"], channels_of(tokenizer), example["name"])
        made = tokenizer(images=image, input_data_format="channels_last", return_tensors="np")
        return {"pixel_values": made["pixel_values"][0], "labels": example["label"]}

    def score(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, float]:
        right = sum(a == e["label"] for a, e in zip(answers, examples, strict=True))
        return {"accuracy": right / len(examples)}

    def source(self, example: Example) -> str:
        return str(example["name"])

    def references(self, example: Example) -> list[str]:
        return [self.labels[example["label"]]]


def channels_of(processor: Any) -> int:
    """How many channels the base of an image processor sees: 1 or 3."""
    mean = getattr(processor, "image_mean", None)
    return len(mean) if isinstance(mean, (list, tuple)) else 3


def with_channels(image: Any, channels: int, where: str) -> Any:
    """An image of bytes as (height, width, channels): grey is repeated, colours are averaged.

    Raises:
        RecipeError: it is not an image of bytes. The message begins with ``where``.
    """
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or 0 in pixels.shape:
        raise RecipeError(
            f"{where}: an image must be bytes of height and width, and maybe of 3 colours; this "
            f"is {pixels.dtype}, {list(pixels.shape)}."
        )
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels[..., :3]
    if pixels.shape[-1] == channels:
        return pixels
    grey = pixels.mean(-1, keepdims=True).round().astype(np.uint8)
    return np.repeat(grey, channels, axis=-1)
