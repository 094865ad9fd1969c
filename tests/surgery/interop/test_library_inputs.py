"""Example inputs that are made from what a model's library says of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from tests.support.vision import WIDTH, Channels


class Patches(nn.Module):
    """An image model; ``says`` are the attributes by which a library names the size of images."""

    def __init__(self, **says: Any) -> None:
        super().__init__()
        self.patch, self.block = nn.Conv2d(3, WIDTH, 4, stride=4), Channels()
        for name, value in says.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1:] == (3, 8, 8)
        return self.block(self.patch(x)).mean((2, 3))


@pytest.mark.parametrize(
    "says", [{"pretrained_cfg": {"input_size": (3, 8, 8)}}, {"image_size": 8}], ids=str
)
def test_the_size_of_images_that_a_model_names(says: dict[str, Any]) -> None:
    assert len(surgery.locate(Patches(**says)).attention) == 1
    half = Patches(**says).to(torch.bfloat16)
    surgery.splice(half, surgery.method("lora", rank=2))


class Sentences(nn.Module):
    """A model that turns sentences into its own input, as sentence-transformers' does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(99, 8), nn.TransformerEncoderLayer(8, 2, 16)

    def tokenize(self, sentences: list[str]) -> dict[str, Tensor]:
        rows = [[ord(c) % 99 for c in sentence[:7]] for sentence in sentences]
        return {"input_ids": torch.tensor(rows)}

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": self.mix(self.embed(features["input_ids"])).mean(1)}


def test_sentences_for_a_model_of_sentence_transformers() -> None:
    with pytest.raises(surgery.SiteError, match="the inputs of Sentences are unknown"):
        surgery.locate(Sentences())
    kind = type("Model", (Sentences,), {"__module__": "sentence_transformers.of_a_test"})
    assert len(surgery.locate(kind()).attention) == 1
