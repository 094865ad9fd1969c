"""A task that needs no data: tell whether the brackets of a text are balanced."""

import random
from dataclasses import dataclass
from typing import ClassVar

import surgery
from surgery_recipes.tasks import Classification


@dataclass(frozen=True)
class Brackets(Classification):
    """Texts of brackets, drawn from a seed: half of them are balanced.

    Attributes:
        length: brackets in a text; an even number.
        train, test: how many texts there are.
        seed: of the texts.
    """

    name: ClassVar[str] = "brackets"

    length: int = 8
    train: int = 1000
    test: int = 200
    seed: int = 0

    @property
    def labels(self):
        return ("unbalanced", "balanced")

    def splits(self):
        if self.length < 4 or self.length % 2:
            raise surgery.RecipeError(f"task brackets: length={self.length} must be even, from 4.")
        draw = random.Random(self.seed)
        sizes = {"train": self.train, "validation": self.test, "test": self.test}
        return {name: [self._example(draw, i % 2) for i in range(n)] for name, n in sizes.items()}

    def _example(self, draw, label):
        text = draw.sample("()" * (self.length // 2), self.length)
        while balanced(text) != bool(label):
            draw.shuffle(text)
        return {"texts": (" ".join(text),), "label": label}


def balanced(text):
    depth = 0
    for bracket in text:
        depth += 1 if bracket == "(" else -1
        if depth < 0:
            return False
    return depth == 0


@surgery.hookimpl
def register_tasks(register):
    register(Brackets)
