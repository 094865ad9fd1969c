"""Digits: 1,797 images of 8 by 8 pixels that scikit-learn ships (Alpaydin and Kaynak 1998).

They stand in for larger sets of images where nothing can be downloaded.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

import surgery
from surgery import Example, RecipeError
from surgery_recipes.tasks.images import ImageClassification


@dataclass(frozen=True)
class Digits(ImageClassification):
    """Handwritten digits, drawn at random into training, validation and test images.

    Attributes:
        held_out: the number of validation images.
        tested: the number of test images.
    """

    name: ClassVar[str] = "digits"

    held_out: int = 180
    tested: int = 360

    def __post_init__(self) -> None:
        if self.held_out < 1 or self.tested < 1 or self.held_out + self.tested > 1700:
            raise RecipeError(
                "task 'digits': held_out and tested must be 1 or more each, and 1,700 of the 1,797 "
                "images at most together."
            )

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple("0123456789")

    def splits(self) -> dict[str, list[Example]]:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise RecipeError(
                "task 'digits': scikit-learn ships the images. pip install scikit-learn"
            ) from error
        found = load_digits()
        examples = [
            {
                "image": np.rint(image * (255 / 16)).astype(np.uint8),  # of 17 shades
                "label": int(label),
                "name": f"image {number}",
            }
            for number, (image, label) in enumerate(zip(found.images, found.target, strict=True))
        ]
        random.Random(0).shuffle(examples)
        end = self.tested + self.held_out
        return {
            "train": examples[end:],
            "validation": examples[self.tested : end],
            "test": examples[: self.tested],
        }


@surgery.hookimpl
def register_tasks(register: surgery.RegisterTask) -> None:
    register(Digits)
