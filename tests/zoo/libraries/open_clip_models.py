"""open_clip's models, tiny, with random weights: two towers, and CoCa's decoder over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.zoo.libraries.operators import without_compiled_operators
from tests.zoo.libraries.timm_models import wake

TEXT = {"context_length": 9, "vocab_size": 60, "width": 24, "heads": 3, "layers": 2}
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 8, "layers": 2}
POOLED = {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 4}
OWN = {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "CLIP": ("CLIP", {"text_cfg": TEXT, "vision_cfg": VISION}),
    "CLIP with pooled attention": (
        "CLIP",
        {"text_cfg": TEXT, "vision_cfg": {**VISION, **POOLED}},
    ),
    "CLIP with a ResNet": (
        "CLIP",
        {
            "text_cfg": TEXT,
            "vision_cfg": {"image_size": 64, "layers": (1, 1, 1, 1), "width": 8, "head_width": 8},
        },
    ),
    "CustomTextCLIP": ("CustomTextCLIP", {"text_cfg": TEXT, "vision_cfg": VISION}),
    "CustomTextCLIP, own blocks": (
        "CustomTextCLIP",
        {"text_cfg": {**TEXT, **OWN}, "vision_cfg": {**VISION, **OWN}},
    ),
    "CoCa": (
        "CoCa",
        {
            "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
            "vision_cfg": {**VISION, **POOLED, "output_tokens": True},
            "multimodal_cfg": {**TEXT, "mlp_ratio": 2},
        },
    ),
}


def names() -> list[str]:
    """The cases, sorted."""
    return sorted(CASES)


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model in evaluation mode, and the arguments of one forward."""
    without_compiled_operators()
    import open_clip

    kind, options = CASES[name]
    torch.manual_seed(0)
    width = 24
    classes: Any = {"CoCa": open_clip.CoCa, "CLIP": open_clip.CLIP}
    made: nn.Module = classes.get(kind, open_clip.CustomTextCLIP)(width, **options)
    wake(made)
    size = options["vision_cfg"]["image_size"]
    text = torch.randint(1, 60, (2, TEXT["context_length"]))
    return made.eval(), {"image": torch.randn(2, 3, size, size), "text": text}
