"""The smallest model of each of timm's modules that has modules of attention, with random weights.

``names`` builds every model of every module on the meta device and counts: that takes minutes, so
the result stands below. ``python -m tests.zoo.libraries.timm_models`` prints it anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.zoo.libraries.counting import attention_modules
from tests.zoo.libraries.operators import without_compiled_operators

SMALLEST = """
beit_base_patch16_224 halonet_h1 bat_resnext26ts cait_xxs24_224 coat_tiny convit_tiny cpubone_nano
crossvit_tiny_240 csatv2 davit_tiny deepseek_vit_412m deit_tiny_patch16_224 edgenext_xx_small
efficientformer_l1 efficientformerv2_s0 efficientvit_m0 vit_tiny_patch16_dinov3_qkvb fastvit_mci0
gcvit_xxtiny gemma4_vit_167m hiera_tiny_224 sam2_hiera_tiny levit_128s lowformer_b0 test_coatnet
caformer_s18 mobilenetv4_hybrid_medium_075 mobilenetv5_base mobilevit_xxs mvitv2_tiny
naflexvit_base_patch16_parfac_gap nest_tiny nextvit_small pit_ti_224 pvt_v2_b0 qwen3_vit_88m
resnest14d skresnet18 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256
swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 twins_svt_small visformer_tiny test_vit
vit_tiny_r_s16_p8_224 test_vit_relpos samvit_base_patch16_224 vitamin_small_224 volo_d1_224
xcit_nano_12_p8_224
""".split()


def names() -> list[str]:
    """The names of the models, one for each module of timm."""
    return SMALLEST


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model in evaluation mode, and the arguments of one forward."""
    without_compiled_operators()
    import timm

    torch.manual_seed(0)
    model: Any = timm.create_model(name, pretrained=False)
    cut(model)
    size = model.pretrained_cfg["input_size"]  # (channels, height, width)
    image = torch.randn(2 if size[-1] <= 384 else 1, *size)
    wake(model)
    settle(model, image)
    return model.eval(), {"x": image}


def cut(model: nn.Module) -> None:
    """Keep the first three blocks of each stack of one class of blocks in a large model."""
    if sum(p.numel() for p in model.parameters()) < 80e6:
        return
    for parent in list(model.modules()):
        blocks: Any = getattr(parent, "blocks", ())
        kinds = {type(block) for block in blocks}
        if len(blocks) > 3 and len(kinds) == 1 and kinds != {nn.Sequential}:
            parent.blocks = blocks[:3]


@torch.no_grad()
def wake(model: nn.Module) -> None:
    """Give parameters that start as zeros small random values, so that every part matters."""
    for parameter in model.parameters():
        if parameter.numel() > 1 and not parameter.any():
            parameter.normal_(std=0.1)


@torch.no_grad()
def settle(model: nn.Module, image: torch.Tensor) -> None:
    """Let batch norms take the statistics of one batch: with others, deep models run off."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None
    if norms:
        model.train()(image)


def smallest() -> list[str]:
    """The smallest model of each module, by parameters."""
    without_compiled_operators()
    import timm
    from timm.models import list_modules

    found = []
    for module in sorted(list_modules()):
        sizes = {}
        for name in timm.list_models(module=module):
            with torch.device("meta"):
                try:
                    model = timm.create_model(name, pretrained=False)
                except Exception:  # some cannot be built on the meta device
                    continue
            if attention_modules(model):
                sizes[name] = sum(p.numel() for p in model.parameters())
        found += [min(sizes, key=lambda name: sizes[name])] if sizes else []
    return found


if __name__ == "__main__":
    print(" ".join(smallest()))
