"""Pretrain a small vision transformer from random weights, on the training images of ``digits``.

The result is a base for the recipes of ``digits`` on a machine without a real one. It learns by how
many quarter turns an image was rotated (Gidaris et al. 2018, arXiv:1803.07728), so it has seen no
label. With 8 by 8 pixels and patches of 2 by 2 it has 16 patches.

Run:  python -m surgery_recipes.tools.pretrain_vit --output bases/vit_digits
      surgery train digits/lora
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, set_seed

import surgery

TURNS = 4


def turned(images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Each image in its four turns, as pixels between -1 and 1, and the number of turns."""
    whole = np.stack([np.rot90(images, turns, axes=(1, 2)) for turns in range(TURNS)])
    pixels = torch.from_numpy(whole.astype(np.float32) / 127.5 - 1)  # (4, N, 8, 8)
    turns = torch.arange(TURNS)[:, None].expand(TURNS, len(images))
    return pixels.flatten(0, 1)[:, None], turns.flatten()


def pretrain(options: argparse.Namespace) -> float:
    """Train the model, save it in one folder with its image processor; return the last accuracy."""
    set_seed(options.seed)
    examples = surgery.task("digits").splits()["train"]
    pixels, turns = turned(np.stack([example["image"] for example in examples]))
    model = ViTForImageClassification(
        ViTConfig(
            image_size=8, patch_size=2, num_channels=1, hidden_size=options.width,
            num_hidden_layers=options.layers, num_attention_heads=options.heads,
            intermediate_size=2 * options.width, num_labels=TURNS,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, options.steps)
    right = 0.0
    for _ in range(options.steps):
        drawn = torch.randint(len(turns), (options.batch,))
        out = model(pixel_values=pixels[drawn], labels=turns[drawn])
        out.loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        right = 0.95 * right + 0.05 * float((out.logits.argmax(-1) == turns[drawn]).float().mean())
    model.save_pretrained(options.output)
    grey = {"image_mean": [0.5], "image_std": [0.5], "size": {"height": 8, "width": 8}}
    ViTImageProcessorPil(**grey, do_resize=True).save_pretrained(options.output)
    count = sum(p.numel() for p in model.parameters())
    print(f"{options.output}: {count:,} parameters, turns told apart: {right:.2f}")
    return right


def main(words: list[str] | None = None) -> None:
    """Read the command line, or ``words`` in its place."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="bases/vit_digits")
    for name, value in (("layers", 4), ("width", 64), ("heads", 4), ("steps", 800)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("batch", 64), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rate", type=float, default=1e-3)
    pretrain(parser.parse_args(words))


if __name__ == "__main__":
    main()
