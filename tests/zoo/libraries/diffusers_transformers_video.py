"""Tiny diffusers transformers for videos."""

from __future__ import annotations

from typing import Any

from tests.zoo.libraries.diffusers_parts import (
    AXES,
    FLOW,
    HEADS,
    JOINT,
    LATENTS,
    MASKED_TEXT,
    POOLED,
    STEP,
    TEXT,
    VIDEO,
    Case,
    Options,
    angles,
    noise,
    places,
    share,
    steps,
)

FRAMES_FIRST: Options = {"hidden_states": noise(2, 2, 4, 6, 4)}
COG: Options = (
    HEADS
    | LATENTS
    | {"time_embed_dim": 24, "text_embed_dim": 20, "num_layers": 1, "sample_width": 4}
    | {"sample_height": 6, "sample_frames": 5, "max_text_seq_length": 7}
    | {"use_rotary_positional_embeddings": True}
)
WAN: Options = HEADS | LATENTS | {"text_dim": 20, "freq_dim": 32, "ffn_dim": 64, "num_layers": 1}


def allegro_angles() -> Any:
    """Cosines and sines of each axis, and the place on it of each token."""
    return [made_angles(size) for size in (2, 3, 2)], places((2, 3, 2)).T[:, None]


def made_angles(length: int) -> Any:
    """Cosines and sines of one axis."""
    return angles(length, 4)()


VIDEOS: dict[str, Case] = {
    "HunyuanVideoTransformer3DModel": (
        JOINT
        | LATENTS
        | {"num_refiner_layers": 1, "text_embed_dim": 20, "pooled_projection_dim": 28}
        | {"rope_axes_dim": AXES},
        VIDEO | MASKED_TEXT | POOLED | STEP | {"guidance": share(2)},
    ),
    "WanTransformer3DModel": (WAN, VIDEO | TEXT | STEP),
    "SkyReelsV2Transformer3DModel": (
        WAN | {"inject_sample_info": True},
        VIDEO | TEXT | STEP | {"fps": [0, 1]},
    ),
    "LTXVideoTransformer3DModel": (
        HEADS
        | {"in_channels": 8, "out_channels": 8, "cross_attention_dim": 48, "num_layers": 1}
        | {"caption_channels": 20},
        MASKED_TEXT
        | STEP
        | {"hidden_states": noise(2, 12, 8), "num_frames": 2, "height": 3, "width": 2},
    ),
    "CogVideoXTransformer3DModel": (
        COG,
        FRAMES_FIRST | TEXT | STEP | {"image_rotary_emb": angles(12, 16)},
    ),
    "ConsisIDTransformer3DModel": (
        COG
        | {"is_train_face": True, "cross_attn_interval": 1, "cross_attn_dim_head": 8}
        | {"cross_attn_num_heads": 4, "LFE_id_dim": 26, "LFE_vit_dim": 18, "LFE_depth": 2}
        | {"LFE_dim_head": 8, "LFE_num_heads": 3, "LFE_num_id_token": 3, "LFE_num_querie": 5}
        | {"LFE_output_dim": 32, "LFE_ff_mult": 2, "LFE_num_scale": 2},
        FRAMES_FIRST
        | TEXT
        | STEP
        | {"image_rotary_emb": angles(12, 16), "id_cond": noise(2, 26)}
        | {"id_vit_hidden": [noise(2, 6, 18), noise(2, 6, 18)]},
    ),
    "MochiTransformer3DModel": (
        HEADS
        | {"num_layers": 2, "pooled_projection_dim": 28, "in_channels": 4, "text_embed_dim": 24}
        | {"time_embed_dim": 32, "max_sequence_length": 7},
        VIDEO | MASKED_TEXT | STEP | {"encoder_hidden_states": noise(2, 7, 24)},
    ),
    "AllegroTransformer3DModel": (
        LATENTS
        | {"num_attention_heads": 3, "attention_head_dim": 12, "num_layers": 1}
        | {"cross_attention_dim": 36, "sample_height": 6, "sample_width": 4, "sample_frames": 2}
        | {"caption_channels": 20},
        VIDEO | MASKED_TEXT | STEP | {"image_rotary_emb": allegro_angles},
    ),
    "LatteTransformer3DModel": (
        HEADS
        | LATENTS
        | {"num_layers": 1, "cross_attention_dim": 48, "sample_size": 8, "patch_size": 2}
        | {"norm_type": "ada_norm_single", "norm_elementwise_affine": False, "norm_eps": 1e-6}
        | {"num_embeds_ada_norm": 1000, "caption_channels": 20, "video_length": 2},
        VIDEO | TEXT | STEP,
    ),
    "EasyAnimateTransformer3DModel": (
        HEADS
        | LATENTS
        | {"patch_size": 2, "sample_width": 4, "sample_height": 6, "num_layers": 2}
        | {"mmdit_layers": 1, "time_embed_dim": 24, "text_embed_dim": 20}
        | {"text_embed_dim_t5": 26},
        VIDEO | TEXT | STEP | {"encoder_hidden_states_t5": noise(2, 5, 26)},
    ),
    "Kandinsky5Transformer3DModel": (
        {"in_visual_dim": 4, "in_text_dim": 20, "in_text_dim2": 28, "time_dim": 24}
        | {"out_visual_dim": 4, "model_dim": 48, "ff_dim": 64, "num_text_blocks": 1}
        | {"num_visual_blocks": 1, "axes_dims": AXES, "visual_cond": True},
        TEXT
        | POOLED
        | FLOW
        | {"hidden_states": noise(2, 2, 6, 4, 9), "text_rope_pos": steps(7)}
        | {"visual_rope_pos": [steps(2), steps(3), steps(2)]},
    ),
}
