"""Tiny diffusers transformers for images, of the models that came from late 2025 on."""

from __future__ import annotations

from tests.zoo.libraries.diffusers_parts import (
    AXES,
    FLOAT_STEP,
    FLOW,
    HEADS,
    IDS,
    IMAGE,
    JOINT,
    LATENTS,
    MASKED_TEXT,
    STEP,
    TEXT,
    TOKENS,
    Case,
    Options,
    filled,
    fixed,
    grid,
    kept,
    noise,
    share,
    whole,
)

JOY: Options = {
    "in_channels": 4,
    "hidden_size": 48,
    "num_attention_heads": 3,
    "text_dim": 20,
    "num_layers": 2,
    "rope_dim_list": [*AXES],
}

RECENT: dict[str, Case] = {
    "BriaFibo2Transformer2DModel": (
        {"in_channels": 4, "dim": 48, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 3}
        | {"cap_feat_dim": 20, "injection_layer_ids": (1,), "perceiver_num_layers": 1}
        | {"min_num_gist_tokens": 2, "max_num_gist_tokens": 6, "gist_step": 2}
        | {"gist_min_text_len": 2, "gist_max_text_len": 8}
        | {"axes_dims": AXES, "axes_lens": (16, 16, 16)},
        IMAGE
        | FLOW
        | {"encoder_hidden_states": noise(2, 2, 7, 20), "encoder_attention_mask": kept(7, 7, 4)}
        | {"context_latents": [noise(2, 4, 4, 4)]},
    ),
    "Flux3Transformer2DModel": (
        JOINT
        | {"in_channels": 8, "cond_in_channels": 10, "joint_attention_dim": 20}
        | {"timestep_channels": 32, "axes_dims_rope": (4, 4, 4, 4), "flow_map": True},
        TOKENS
        | TEXT
        | FLOW
        | {"img_ids": grid(1, 3, 5, 1), "txt_ids": grid(1, 1, 1, 7), "target_timestep": share(2)}
        | {"image_cond_hidden_states": noise(2, 6, 10), "image_cond_ids": grid(1, 2, 3, 1)},
    ),
    "GlmImageTransformer2DModel": (
        HEADS
        | LATENTS
        | {"num_layers": 1, "text_embed_dim": 20, "time_embed_dim": 24, "condition_dim": 16}
        | {"prior_vq_quantizer_codebook_size": 50},
        IMAGE
        | TEXT
        | STEP
        | {"prior_token_id": whole(50, 2, 15), "prior_token_drop": kept(15, 0, 4)}
        | {"target_size": filled(48.0, 2, 2), "crop_coords": filled(3.0, 2, 2)},
    ),
    "HunyuanImageTransformer2DModel": (
        JOINT
        | {"in_channels": 8, "out_channels": 8, "num_refiner_layers": 1, "guidance_embeds": True}
        | {"text_embed_dim": 20, "text_embed_2_dim": 26, "rope_axes_dim": (8, 8)}
        | {"use_meanflow": True},
        MASKED_TEXT
        | FLOAT_STEP
        | {"hidden_states": noise(2, 8, 3, 5), "timestep_r": fixed([20.0, 500.0])}
        | {"encoder_hidden_states_2": noise(2, 5, 26), "encoder_attention_mask_2": kept(5, 2, 5)}
        | {"guidance": share(2)},
    ),
    "Ideogram4Transformer2DModel": (
        HEADS
        | {"in_channels": 8, "num_layers": 1, "intermediate_size": 64, "adaln_dim": 24}
        | {"llm_features_dim": 20, "mrope_section": (3, 3, 2)},
        FLOW
        | {"hidden_states": noise(2, 22, 8), "encoder_hidden_states": noise(2, 22, 20)}
        | {
            "position_ids": whole(20, 2, 22, 3),
            "segment_ids": fixed([[1] * 22, [1] * 19 + [0] * 3]),
        }
        | {"indicator": fixed([[3] * 7 + [2] * 15, [3] * 4 + [2] * 15 + [-1] * 3])},
    ),
    "LongCatImageTransformer2DModel": (
        JOINT | {"in_channels": 8, "joint_attention_dim": 20, "axes_dims_rope": [*AXES]},
        TOKENS | TEXT | FLOW | IDS,
    ),
    "NucleusMoEImageTransformer2DModel": (
        HEADS
        | {"in_channels": 8, "out_channels": 4, "num_layers": 2, "num_key_value_heads": 1}
        | {"joint_attention_dim": 20, "axes_dims_rope": AXES, "num_experts": 4}
        | {"dense_moe_strategy": "leave_first_block_dense", "moe_intermediate_dim": 32}
        | {"capacity_factors": 2.0},
        TOKENS
        | TEXT
        | FLOW
        | {"encoder_hidden_states_mask": kept(7, 7, 4), "img_shapes": [[(1, 3, 5)]] * 2},
    ),
    "OvisImageTransformer2DModel": (
        JOINT
        | {"in_channels": 8, "out_channels": 8, "joint_attention_dim": 20}
        | {"axes_dims_rope": AXES},
        TOKENS | TEXT | FLOW | IDS,
    ),
    "PRXTransformer2DModel": (
        {"in_channels": 4, "context_in_dim": 20, "hidden_size": 48, "num_heads": 3, "depth": 1}
        | {"axes_dim": [8, 8], "resolution_embeds": True},
        IMAGE | TEXT | FLOW | {"attention_mask": kept(7, 7, 4)},
    ),
    "QwenImage21Transformer2DModel": (
        HEADS
        | {"in_channels": 8, "out_channels": 8, "num_layers": 1, "context_in_dim": 20}
        | {"axes_dims_rope": AXES},
        TEXT
        | FLOW
        | {"hidden_states": noise(2, 12, 8), "encoder_hidden_states_mask": kept(7, 7, 4)}
        | {"img_shapes": [[(1, 2, 2), (1, 2, 4)]] * 2}
        | {"img_mask": fixed([[False] * 3 + [True] + [False] * 3 + [True] * 2] * 2)},
    ),
    "ZImageTransformer2DModel": (
        {"in_channels": 4, "dim": 48, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 3}
        | {"n_kv_heads": 3, "cap_feat_dim": 20, "axes_dims": [*AXES], "axes_lens": [64, 64, 64]},
        {"x": [noise(4, 1, 6, 10), noise(4, 1, 6, 10)], "t": share(2)}
        | {"cap_feats": [noise(7, 20), noise(4, 20)]},
    ),
    "ErnieImageTransformer2DModel": (
        {"hidden_size": 48, "num_attention_heads": 3, "num_layers": 1, "ffn_hidden_size": 64}
        | {"in_channels": 8, "out_channels": 8, "text_in_dim": 20, "rope_axes_dim": AXES},
        FLOW
        | {"hidden_states": noise(2, 8, 3, 5), "text_bth": noise(2, 7, 20)}
        | {"text_lens": fixed([7, 4])},
    ),
    "JoyImageEditTransformer3DModel": (
        JOY,
        TEXT | STEP | {"hidden_states": noise(2, 2, 4, 1, 4, 6)},
    ),
    "JoyImageEditPlusTransformer3DModel": (
        JOY,
        TEXT
        | STEP
        | {"hidden_states": noise(2, 12, 4, 1, 2, 2), "encoder_hidden_states_mask": kept(7, 7, 4)}
        | {"shape_list": [[(1, 2, 3), (1, 3, 2)], [(1, 2, 3)]]},
    ),
}
