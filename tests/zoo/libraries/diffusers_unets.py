"""Tiny diffusers UNets."""

from __future__ import annotations

from tests.zoo.libraries.diffusers_parts import (
    HEADS,
    STEP,
    TEXT,
    Case,
    Options,
    fixed,
    kept,
    noise,
    share,
    whole,
)

LEVELS: Options = {"block_out_channels": (24, 48), "layers_per_block": 1, "norm_num_groups": 8}
CROSS: Options = LEVELS | {"cross_attention_dim": 20}
SAMPLE: Options = {"sample": noise(2, 4, 4, 6)} | STEP
FRAMES: Options = {"sample": noise(2, 4, 2, 4, 6)} | STEP
EXTRAS: Options = {"text_embeds": noise(2, 28), "time_ids": share(2, 6)}
ADDITIONS: Options = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 28 + 6 * 8,
}
DREAM = "DreamLiteCrossAttn"


def blocks(kind: str) -> Options:
    """A level with attention and a level without, on the way down and on the way up."""
    return {
        "down_block_types": (f"CrossAttnDownBlock{kind}", f"DownBlock{kind}"),
        "up_block_types": (f"UpBlock{kind}", f"CrossAttnUpBlock{kind}"),
    }


UNETS: dict[str, Case] = {
    "UNet2DModel": (
        LEVELS
        | {"in_channels": 4, "out_channels": 4, "attention_head_dim": 8, "num_class_embeds": 10}
        | {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
        | {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
        SAMPLE | {"class_labels": fixed([3, 8])},
    ),
    "UNet2DConditionModel": (
        CROSS | blocks("2D") | ADDITIONS | {"attention_head_dim": 3, "use_linear_projection": True},
        SAMPLE | TEXT | {"added_cond_kwargs": EXTRAS, "encoder_attention_mask": kept(7, 7, 4)},
    ),
    "DreamLiteUNetModel": (
        CROSS
        | {"attention_head_dim": 3, "use_linear_projection": True, "ff_mult": 2}
        | {"down_block_types": (f"{DREAM}NoSelfAttnDownBlock2D", f"{DREAM}DownBlock2D")}
        | {"up_block_types": (f"{DREAM}UpBlock2D", f"{DREAM}NoSelfAttnUpBlock2D")},
        SAMPLE | TEXT | {"encoder_attention_mask": kept(7, 7, 4)},
    ),
    "AudioLDM2UNet2DConditionModel": (
        LEVELS
        | blocks("2D")
        | {"cross_attention_dim": ((None, 20, 26), (None, 20, 26)), "attention_head_dim": 3},
        SAMPLE
        | TEXT
        | {"encoder_attention_mask": kept(7, 7, 4), "encoder_hidden_states_1": noise(2, 5, 26)}
        | {"encoder_attention_mask_1": kept(5, 2, 5)},
    ),
    "UNet3DConditionModel": (
        CROSS | blocks("3D") | {"attention_head_dim": 8},
        FRAMES | TEXT,
    ),
    "I2VGenXLUNet": (
        CROSS | blocks("3D") | {"attention_head_dim": 8},
        FRAMES
        | TEXT
        | {"fps": fixed([8, 16]), "image_latents": noise(2, 4, 2, 4, 6)}
        | {"image_embeddings": noise(2, 20)},
    ),
    "UNetMotionModel": (
        CROSS
        | blocks("Motion")
        | ADDITIONS
        | {"num_attention_heads": 3, "motion_num_attention_heads": 3}
        | {"motion_max_seq_length": 4},
        FRAMES | {"encoder_hidden_states": noise(4, 7, 20), "added_cond_kwargs": EXTRAS},
    ),
    "UNetSpatioTemporalConditionModel": (
        blocks("SpatioTemporal")
        | {"block_out_channels": (32, 64), "addition_time_embed_dim": 8, "layers_per_block": 1}
        | {"projection_class_embeddings_input_dim": 24, "cross_attention_dim": 20}
        | {"num_attention_heads": 4, "num_frames": 2},
        STEP
        | {"sample": noise(2, 2, 8, 4, 6), "encoder_hidden_states": noise(2, 3, 20)}
        | {"added_time_ids": share(2, 3)},
    ),
    "UNet1DModel": (
        {"sample_size": 32, "in_channels": 4, "out_channels": 4, "extra_in_channels": 16}
        | {"time_embedding_dim": 16},
        STEP | {"sample": noise(2, 4, 32)},
    ),
    "Kandinsky3UNet": (
        {"time_embedding_dim": 24, "groups": 4, "attention_head_dim": 8, "layers_per_block": 2}
        | {"block_out_channels": (16, 24, 32, 48), "cross_attention_dim": 24}
        | {"encoder_hid_dim": 20},
        STEP | TEXT | {"sample": noise(2, 4, 8, 16), "encoder_attention_mask": kept(7, 7, 4)},
    ),
    "StableCascadeUNet": (
        {"in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 16}
        | {"conditioning_dim": 20, "block_out_channels": (24, 48), "num_attention_heads": (3, 3)}
        | {"down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1)}
        | {"clip_text_in_channels": 26, "clip_text_pooled_in_channels": 28}
        | {"clip_image_in_channels": 18, "clip_seq": 2},
        {"sample": noise(2, 4, 4, 6), "timestep_ratio": share(2)}
        | {"clip_text_pooled": noise(2, 1, 28), "clip_text": noise(2, 7, 26)}
        | {"clip_img": noise(2, 1, 18)},
    ),
    "UVit2DModel": (
        {"hidden_size": 48, "cond_embed_dim": 28, "micro_cond_encode_dim": 8}
        | {"micro_cond_embed_dim": 40, "encoder_hidden_size": 20, "vocab_size": 40}
        | {"codebook_size": 36, "in_channels": 24, "block_out_channels": 24}
        | {"num_res_blocks": 1, "block_num_heads": 3, "num_hidden_layers": 1}
        | {"num_attention_heads": 3, "intermediate_size": 64, "sample_size": 4},
        TEXT
        | {"input_ids": whole(40, 2, 4, 6), "pooled_text_emb": noise(2, 28)}
        | {"micro_conds": share(2, 5)},
    ),
    "TransformerTemporalModel": (
        HEADS | {"in_channels": 24, "norm_num_groups": 8},
        {"hidden_states": noise(4, 24, 3, 5), "num_frames": 2},
    ),
    "Transformer2DModel": (
        HEADS | {"in_channels": 24, "norm_num_groups": 8, "cross_attention_dim": 20},
        TEXT | {"hidden_states": noise(2, 24, 3, 5), "encoder_attention_mask": kept(7, 7, 4)},
    ),
    "DualTransformer2DModel": (
        HEADS | {"in_channels": 24, "norm_num_groups": 8, "cross_attention_dim": 20},
        {"hidden_states": noise(2, 24, 3, 5), "encoder_hidden_states": noise(2, 82, 20)},
    ),
    "DreamLiteTransformer2DModel": (
        HEADS
        | {"in_channels": 24, "norm_num_groups": 8, "cross_attention_dim": 20}
        | {"qk_norm": "rms_norm"},
        TEXT | {"hidden_states": noise(2, 24, 3, 5)},
    ),
}
