"""Tiny diffusers transformers for images with one stream, or with cross attention to a text."""

from __future__ import annotations

from tests.zoo.libraries.diffusers_parts import (
    AXES,
    FLOW,
    HEADS,
    IMAGE,
    LATENTS,
    MASKED_TEXT,
    STEP,
    TEXT,
    Case,
    angles,
    causal,
    complex_angles,
    fixed,
    kept,
    noise,
    share,
    steps,
    whole,
)

ONE_STREAM: dict[str, Case] = {
    "PixArtTransformer2DModel": (
        HEADS
        | {"in_channels": 4, "num_layers": 1, "cross_attention_dim": 48, "sample_size": 8}
        | {"caption_channels": 20, "use_additional_conditions": True},
        IMAGE
        | MASKED_TEXT
        | STEP
        | {"added_cond_kwargs": {"resolution": share(2, 2), "aspect_ratio": share(2, 1)}},
    ),
    "DiTTransformer2DModel": (
        HEADS | {"in_channels": 4, "num_layers": 1, "sample_size": 6, "num_embeds_ada_norm": 10},
        STEP | {"hidden_states": noise(2, 4, 6, 6), "class_labels": fixed([3, 8])},
    ),
    "SanaTransformer2DModel": (
        HEADS
        | LATENTS
        | {"num_layers": 1, "num_cross_attention_heads": 4, "cross_attention_head_dim": 12}
        | {"cross_attention_dim": 48, "caption_channels": 20, "sample_size": 8},
        MASKED_TEXT | STEP | {"hidden_states": noise(2, 4, 3, 5)},
    ),
    "LuminaNextDiT2DModel": (
        {"sample_size": 8, "in_channels": 4, "hidden_size": 48, "num_layers": 1}
        | {"num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 16}
        | {"cross_attention_dim": 20},
        IMAGE
        | TEXT
        | FLOW
        | {"encoder_mask": kept(7, 7, 4), "image_rotary_emb": complex_angles(8, 8, 8)}
        | {"cross_attention_kwargs": {}},
    ),
    "Lumina2Transformer2DModel": (
        {"sample_size": 8, "in_channels": 4, "hidden_size": 48, "num_layers": 1}
        | {"num_refiner_layers": 1, "num_attention_heads": 3, "num_kv_heads": 1}
        | {"multiple_of": 16, "axes_dim_rope": AXES, "axes_lens": (24, 8, 8), "cap_feat_dim": 20},
        IMAGE | MASKED_TEXT | FLOW,
    ),
    "OmniGenTransformer2DModel": (
        {"in_channels": 4, "hidden_size": 48, "num_attention_heads": 3, "num_layers": 1}
        | {"num_key_value_heads": 1, "intermediate_size": 64, "pad_token_id": 0}
        | {"vocab_size": 50, "max_position_embeddings": 128, "time_step_dim": 32}
        | {"original_max_position_embeddings": 64, "pos_embed_max_size": 8}
        | {"rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.5] * 8}},
        IMAGE
        | FLOW
        | {"input_ids": whole(50, 2, 9), "input_img_latents": [noise(1, 4, 4, 4)]}
        | {"input_image_sizes": {0: [[2, 6]]}, "attention_mask": causal(2, 25)}
        | {"position_ids": steps(25)},
    ),
    "PriorTransformer": (
        HEADS | {"num_layers": 1, "embedding_dim": 20, "num_embeddings": 7},
        TEXT
        | STEP
        | {"hidden_states": noise(2, 20), "proj_embedding": noise(2, 20)}
        | {"attention_mask": kept(7, 7, 4)},
    ),
    "HunyuanDiT2DModel": (
        HEADS
        | {"in_channels": 4, "patch_size": 2, "sample_size": 8, "hidden_size": 48}
        | {"num_layers": 4, "cross_attention_dim": 20, "cross_attention_dim_t5": 24}
        | {"pooled_projection_dim": 28, "text_len": 7, "text_len_t5": 5},
        IMAGE
        | TEXT
        | {"timestep": fixed([30.0, 700.0]), "text_embedding_mask": kept(7, 7, 4)}
        | {"encoder_hidden_states_t5": noise(2, 5, 24), "text_embedding_mask_t5": kept(5, 2, 5)}
        | {"image_meta_size": fixed([[64.0, 48, 64, 48, 0, 3]] * 2), "style": fixed([0, 0])}
        | {"image_rotary_emb": angles(15, 16)},
    ),
}
