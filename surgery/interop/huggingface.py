"""All knowledge of transformers: its choice of attention function, and what it calls its inputs.

transformers is imported only if the process has imported it already; without it every function
here answers "nothing special".
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def _loaded() -> bool:
    return "transformers.modeling_utils" in sys.modules


def is_pretrained(model: nn.Module) -> bool:
    """Is this a transformers model?"""
    if not _loaded():
        return False
    from transformers.modeling_utils import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def attention_patch(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> list[Any]:
    """Replacements that make transformers hand out ``wrap(function)`` as attention function."""
    if not _loaded():
        return []
    from transformers.modeling_utils import AttentionInterface

    def choose(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_interface(interface: Any, implementation: str, default: Any) -> Any:
            return wrap(original(interface, implementation, default))

        return get_interface

    return [(AttentionInterface, "get_interface", choose)]


def is_own_hook(hook: Callable[..., Any]) -> bool:
    """Is this a forward hook by which transformers itself collects its outputs?"""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def choices(module: nn.Module) -> list[tuple[Any, str]]:
    """What else decides which graph a module needs: who holds its choice of attention function.

    An object and the name of an attribute, for each configuration that the module has.
    """
    configs: dict[int, Any] = {}
    for part in module.modules():
        config = vars(part).get("config")
        if config is not None and hasattr(config, "_attn_implementation"):
            configs[id(config)] = config
    own = "_attn_implementation_internal"
    return [(c, own if own in vars(c) else "_attn_implementation") for c in configs.values()]


def example_inputs(model: nn.Module) -> dict[str, Any] | None:
    """Small inputs for a transformers model, made from its config; None if we cannot tell."""
    if not is_pretrained(model):
        return None
    config: Any = model.config
    device = next(model.parameters()).device
    name = getattr(model, "main_input_name", "input_ids")
    if name == "input_ids":
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        top = int(getattr(text, "vocab_size", 8))
        ids = (torch.arange(14, device=device).reshape(2, 7) * 5 + 3) % top  # (B, n)
        inputs = {"input_ids": ids}
        if device.type != "meta":  # where a mask has no values to look at
            inputs["attention_mask"] = torch.ones_like(ids)
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids[:, :5]
        return inputs
    if name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 32)
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        channels = getattr(vision, "num_channels", 3)
        pixels = torch.linspace(-1, 1, 2 * channels * height * width, device=device)
        dtype = next(model.parameters()).dtype
        return {"pixel_values": pixels.reshape(2, channels, height, width).to(dtype)}
    return None


@contextmanager
def without_checkpointing(module: nn.Module) -> Iterator[None]:
    """Run what is inside without recomputing activations in the backward pass.

    For a second, small run of a model inside a forward: recomputed, it could not be told from the
    first.
    """
    on = [m for m in module.modules() if vars(m).get("gradient_checkpointing") is True]
    try:
        for each in on:
            vars(each)["gradient_checkpointing"] = False
        yield
    finally:
        for each in on:
            vars(each)["gradient_checkpointing"] = True


def fresh_parameters(model: nn.Module) -> list[str]:
    """Names of parameters that ``from_pretrained`` had no weights for (a new head, say)."""
    if not is_pretrained(model):
        return []
    loaded = {n for n, p in model.named_parameters() if getattr(p, "_is_hf_initialized", False)}
    return [n for n, _ in model.named_parameters() if n not in loaded] if loaded else []


def name_or_path(model: nn.Module) -> str | None:
    """What the model was loaded from."""
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None
