"""A small vision transformer is pretrained without labels, and recipes of images train on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from rich.console import Console

from surgery_recipes.recipe_files import find_recipe, read_recipe
from surgery_recipes.run import finetune
from surgery_recipes.tools import pretrain_vit

QUIET = Console(quiet=True)


def test_turns_are_those_of_the_images() -> None:
    image = np.arange(64, dtype=np.uint8).reshape(1, 8, 8)
    pixels, turns = pretrain_vit.turned(image)
    assert turns.tolist() == [0, 1, 2, 3]
    for number in range(4):
        expected = np.rot90(image[0], number) / 127.5 - 1
        np.testing.assert_allclose(pixels[number, 0].numpy(), expected, atol=1e-6)


def test_a_base_learns_to_tell_turns_apart_and_serves_a_recipe(tmp_path: Path) -> None:
    base = tmp_path / "base"
    small = ["--steps", "250", "--layers", "2", "--width", "32", "--rate", "3e-3"]
    pretrain_vit.main(["--output", str(base), *small])
    config = json.loads((base / "config.json").read_text())
    assert (config["model_type"], config["image_size"], config["num_channels"]) == ("vit", 8, 1)
    options = [f"model={base}", "device=cpu", f"output={tmp_path / 'run'}"]
    options += ["training.num_train_epochs=4", "training.report_to=none"]
    options += ["training.disable_tqdm=true", "training.per_device_train_batch_size=16"]
    rows = finetune.train(read_recipe(find_recipe("digits/lora"), options), QUIET)
    assert rows[0].score > 0.3  # by chance: 0.1
    assert rows[0].by_length == []
    assert finetune.evaluate(tmp_path / "run", QUIET) == rows[0].scores
