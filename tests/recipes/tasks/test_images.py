"""Tasks of images: pixels fit the base, digits are drawn the same way, mistakes are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as tr

import surgery
from surgery.errors import RecipeError
from surgery_recipes.tasks import ImageClassification, with_channels


def test_digits_are_three_disjoint_splits_and_always_the_same() -> None:
    splits = surgery.task("digits").splits()
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": 1257, "validation": 180, "test": 360,
    }  # fmt: skip
    names = [example["name"] for rows in splits.values() for example in rows]
    assert len(set(names)) == 1797
    again = surgery.task("digits").splits()
    assert [e["name"] for rows in again.values() for e in rows] == names
    for example in splits["test"][:50]:
        assert example["image"].shape == (8, 8)
        assert example["image"].dtype == np.uint8
    assert {example["label"] for example in splits["test"]} == set(range(10))
    assert max(example["image"].max() for example in splits["train"]) == 255


@pytest.mark.parametrize("options", [{"held_out": 0}, {"tested": 0}, {"tested": 1600}])
def test_an_impossible_split_of_the_digits_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match="1,700 of the 1,797 images at most"):
        surgery.task("digits", **options)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_those_of_the_image_as_the_processor_scales_them(
    channels: int, tmp_path: Path
) -> None:
    size = {"height": 8, "width": 8}
    means = {"image_mean": [0.5] * channels, "image_std": [0.25] * channels}
    tr.ViTImageProcessorPil(size=size, **means).save_pretrained(tmp_path)
    processor = tr.AutoImageProcessor.from_pretrained(tmp_path)
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    made = ImageClassification().encode({"image": grey, "label": 2, "name": "one"}, processor)
    assert made["labels"] == 2
    expected = np.broadcast_to((grey / 255 - 0.5) / 0.25, (channels, 8, 8))
    np.testing.assert_allclose(made["pixel_values"], expected, atol=1e-6)


def test_colours_become_grey_and_transparency_is_left_out() -> None:
    colours = np.zeros((2, 2, 4), dtype=np.uint8)
    colours[..., :3] = (30, 60, 90)
    colours[..., 3] = 255
    assert with_channels(colours, 3, "a").shape == (2, 2, 3)
    assert np.unique(with_channels(colours, 1, "a")).tolist() == [60]


@pytest.mark.parametrize(
    "image", [np.zeros((2, 2)), np.zeros(4, np.uint8), np.zeros((0, 2), np.uint8), "text"]
)
def test_what_is_no_image_is_named(image: Any) -> None:
    with pytest.raises(RecipeError, match="a cat: an image must be bytes of height and width"):
        with_channels(image, 3, "a cat")
