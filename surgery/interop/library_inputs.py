"""Make small example inputs for a model whose library says what its inputs are.

transformers             the config and ``main_input_name``
timm                     ``pretrained_cfg["input_size"]``
torchvision              ``image_size``, where a model has it
sentence-transformers    the tokenizer of the model
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.interop.huggingface import is_pretrained


def example_inputs(model: nn.Module) -> Any:
    """Return the arguments of one small forward, as ``locate`` takes them; None if unknown."""
    return _of_transformers(model) or _of_sentences(model) or _of_images(model)


def _of_transformers(model: nn.Module) -> dict[str, Any] | None:
    """Return small inputs for a transformers model, made from its config; None if unknown.

    Text: 2 sequences of 7 token ids. Images: 2 of the config's size.
    """
    if not is_pretrained(model):
        return None
    config: Any = model.config
    device = next(model.parameters()).device
    name = getattr(model, "main_input_name", "input_ids")
    if name == "input_ids":
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        n_tokens = int(getattr(text, "vocab_size", 8))
        ids = (torch.arange(14, device=device).reshape(2, 7) * 5 + 3) % n_tokens  # (B, n)
        inputs = {"input_ids": ids}
        if device.type != "meta":  # there a mask has no values, and models read them
            inputs["attention_mask"] = torch.ones_like(ids)
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids[:, :5]
        return inputs
    if name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 32)
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return {"pixel_values": _images(model, getattr(vision, "num_channels", 3), height, width)}
    return None


def _of_sentences(model: nn.Module) -> tuple[dict[str, Any]] | None:
    """Return two sentences as the model's own tokenizer makes them, as its one argument."""
    tokenize = getattr(model, "tokenize", None)
    if not callable(tokenize) or not type(model).__module__.startswith("sentence_transformers"):
        return None
    device = next(model.parameters()).device
    made = tokenize(["A small example.", "Another, a little longer than the first."])
    return ({k: v.to(device) if isinstance(v, Tensor) else v for k, v in made.items()},)


def _of_images(model: nn.Module) -> tuple[Tensor] | None:
    """Return two images of the size that the model names: timm's, or torchvision's transformer."""
    config = getattr(model, "pretrained_cfg", None)
    size: Any = config.get("input_size") if isinstance(config, Mapping) else None
    side = getattr(model, "image_size", None)
    if size is None and isinstance(side, int) and not isinstance(side, bool):
        size = (3, side, side)
    return None if size is None else (_images(model, *size),)


def _images(model: nn.Module, channels: int, height: int, width: int) -> Tensor:
    """Return two images (2, channels, height, width) in the dtype of the model."""
    like = next(p for p in model.parameters() if p.is_floating_point())
    pixels = torch.linspace(-1, 1, 2 * channels * height * width, device=like.device)
    return pixels.reshape(2, channels, height, width).to(like.dtype)
