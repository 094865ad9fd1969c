"""torchvision's models with attention, tiny, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.zoo.libraries.operators import without_compiled_operators
from tests.zoo.libraries.timm_models import settle, wake

SWIN = {
    "patch_size": [4, 4],
    "embed_dim": 24,
    "depths": [2, 2],
    "num_heads": [2, 3],
    "window_size": [4, 4],
    "num_classes": 7,
}


def _vit(models: Any) -> nn.Module:
    made: nn.Module = models.VisionTransformer(32, 8, 2, 3, 24, 48, num_classes=7)
    return made


def _swin(models: Any) -> nn.Module:
    made: nn.Module = models.SwinTransformer(**SWIN)
    return made


def _swin_v2(models: Any) -> nn.Module:
    from torchvision.models import swin_transformer as swin

    block, merging = swin.SwinTransformerBlockV2, swin.PatchMergingV2
    made: nn.Module = models.SwinTransformer(**SWIN, block=block, downsample_layer=merging)
    return made


def _maxvit(models: Any) -> nn.Module:
    made: nn.Module = models.MaxVit(
        input_size=(32, 32), stem_channels=16, partition_size=4, block_channels=[16, 24],
        block_layers=[1, 1], head_dim=8, stochastic_depth_prob=0.0, num_classes=7,
    )  # fmt: skip
    return made


MAKERS: dict[str, Callable[[Any], nn.Module]] = {
    "MaxVit": _maxvit,
    "SwinTransformer": _swin,
    "SwinTransformer (V2)": _swin_v2,
    "VisionTransformer": _vit,
}


def names() -> list[str]:
    """The classes, sorted."""
    return sorted(MAKERS)


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model in evaluation mode, and the arguments of one forward."""
    without_compiled_operators()
    from torchvision import models

    torch.manual_seed(0)
    model, image = MAKERS[name](models), torch.randn(2, 3, 32, 32)
    wake(model)
    settle(model, image)
    return model.eval(), {"x": image}
