"""Tiny diffusers ControlNets: each takes what its base model takes, and an image to follow."""

from __future__ import annotations

from typing import Any

from tests.zoo.libraries.diffusers_parts import (
    TEXT,
    Case,
    Maker,
    Options,
    fixed,
    made,
    noise,
)
from tests.zoo.libraries.diffusers_transformers import TWO_STREAMS
from tests.zoo.libraries.diffusers_transformers_image import ONE_STREAM
from tests.zoo.libraries.diffusers_transformers_recent import RECENT
from tests.zoo.libraries.diffusers_unets import ADDITIONS, CROSS, EXTRAS, FRAMES, SAMPLE, blocks

HINT: Options = {"controlnet_cond": noise(2, 3, 8, 12)}
TWO: Options = {"conditioning_scale": [1.0, 0.5], "return_dict": False}
ADDED: Options = {"added_cond_kwargs": EXTRAS}
DOWN: Options = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "conditioning_embedding_out_channels": (8, 12),
}
FLUX, FLUX_INPUTS = TWO_STREAMS["FluxTransformer2DModel"]
SD3, SD3_INPUTS = TWO_STREAMS["SD3Transformer2DModel"]
QWEN, QWEN_INPUTS = TWO_STREAMS["QwenImageTransformer2DModel"]
SANA, SANA_INPUTS = ONE_STREAM["SanaTransformer2DModel"]
HUNYUAN, HUNYUAN_INPUTS = ONE_STREAM["HunyuanDiT2DModel"]
Z_IMAGE, Z_IMAGE_INPUTS = RECENT["ZImageTransformer2DModel"]

TOKENS_HINT: Options = {"controlnet_cond": noise(2, 15, 8)}
LATENTS_HINT: Options = {"controlnet_cond": noise(2, 4, 6, 10)}
UNION_HINT: Options = {
    "controlnet_cond": [noise(2, 3, 8, 12), noise(2, 3, 8, 12)],
    "control_type": fixed([[1.0, 0.0, 1.0]] * 2),
    "control_type_idx": [0, 2],
}


def several(name: str, count: int = 2) -> Maker:
    """So many models of a class."""

    def models() -> list[Any]:
        import diffusers

        return [getattr(diffusers, name)(**made(CONTROLS[name][0])) for _ in range(count)]

    return models


def z_image_control(**options: Any) -> Any:
    """The ControlNet of Z-Image, with the parts that it has from its base model."""
    import diffusers

    base = diffusers.ZImageTransformer2DModel(**Z_IMAGE)
    control = diffusers.ZImageControlNetModel(**options)
    control.gradient_checkpointing = False  # its forward asks for it where gradients are on
    return control.from_transformer(control, base)


CONTROLS: dict[str, Case] = {
    "ControlNetModel": (
        CROSS | DOWN | ADDITIONS | {"attention_head_dim": 3, "use_linear_projection": True},
        SAMPLE | TEXT | HINT | ADDED,
    ),
    "ControlNetUnionModel": (
        CROSS
        | DOWN
        | ADDITIONS
        | {"attention_head_dim": 3, "num_control_type": 3, "num_trans_channel": 24}
        | {"num_trans_head": 3, "num_proj_channel": 24},
        SAMPLE | TEXT | ADDED | UNION_HINT,
    ),
    "SparseControlNetModel": (
        CROSS
        | {"down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion")}
        | {"attention_head_dim": 3, "motion_num_attention_heads": 3, "motion_max_seq_length": 4},
        FRAMES
        | {"encoder_hidden_states": noise(4, 7, 20), "controlnet_cond": noise(2, 4, 2, 4, 6)}
        | {"conditioning_mask": noise(2, 1, 2, 4, 6)},
    ),
    "UNetControlNetXSModel": (
        blocks("2D")
        | {"sample_size": 8, "block_out_channels": (24, 48), "norm_num_groups": 8}
        | {"cross_attention_dim": 20, "num_attention_heads": 3}
        | {"ctrl_conditioning_embedding_out_channels": (8, 12), "ctrl_num_attention_heads": 4}
        | {"ctrl_block_out_channels": (8, 16), "ctrl_max_norm_num_groups": 4}
        | {"ctrl_learn_time_embedding": True, "time_embedding_mix": 0.8},
        SAMPLE | TEXT | HINT,
    ),
    "FluxControlNetModel": (
        FLUX | {"num_mode": 4},
        FLUX_INPUTS | TOKENS_HINT | {"controlnet_mode": fixed([[1], [3]])},
    ),
    "SD3ControlNetModel": (SD3, SD3_INPUTS | LATENTS_HINT),
    "QwenImageControlNetModel": (QWEN, QWEN_INPUTS | TOKENS_HINT),
    "SanaControlNetModel": (SANA, SANA_INPUTS | {"controlnet_cond": noise(2, 4, 3, 5)}),
    "HunyuanDiT2DControlNetModel": (
        {key: value for key, value in HUNYUAN.items() if key != "num_layers"}
        | {"transformer_num_layers": 4},
        HUNYUAN_INPUTS | LATENTS_HINT,
    ),
    "ZImageControlNetModel": (
        {"control_layers_places": [0], "control_refiner_layers_places": [0], "control_in_dim": 6}
        | {"add_control_noise_refiner": "control_noise_refiner", "dim": 48}
        | {"n_refiner_layers": 1, "n_heads": 3, "n_kv_heads": 3},
        Z_IMAGE_INPUTS | {"control_context": [noise(6, 1, 6, 10), noise(6, 1, 6, 10)]},
    ),
    "MultiControlNetModel": (
        {"controlnets": several("ControlNetModel")},
        SAMPLE | TEXT | ADDED | TWO | {"controlnet_cond": [HINT["controlnet_cond"]] * 2},
    ),
    "MultiControlNetUnionModel": (
        {"controlnets": several("ControlNetUnionModel")},
        SAMPLE | TEXT | ADDED | TWO | {key: [value] * 2 for key, value in UNION_HINT.items()},
    ),
    "FluxMultiControlNetModel": (
        {"controlnets": several("FluxControlNetModel")},
        FLUX_INPUTS
        | TWO
        | {"controlnet_cond": [noise(2, 15, 8)] * 2, "controlnet_mode": [fixed([1, 3])] * 2},
    ),
    "SD3MultiControlNetModel": (
        {"controlnets": several("SD3ControlNetModel")},
        SD3_INPUTS | TWO | {"controlnet_cond": [noise(2, 4, 6, 10)] * 2},
    ),
    "QwenImageMultiControlNetModel": (
        {"controlnets": several("QwenImageControlNetModel", 1)},
        QWEN_INPUTS | TWO | {"controlnet_cond": [noise(2, 15, 8)] * 2},
    ),
    "HunyuanDiT2DMultiControlNetModel": (
        {"controlnets": several("HunyuanDiT2DControlNetModel")},
        HUNYUAN_INPUTS | TWO | {"controlnet_cond": [noise(2, 4, 6, 10)] * 2},
    ),
}
