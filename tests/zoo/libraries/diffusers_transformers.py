"""Tiny diffusers transformers for images whose text and image tokens are two streams."""

from __future__ import annotations

from tests.zoo.libraries.diffusers_parts import (
    AXES,
    FLOW,
    HEADS,
    IDS,
    IMAGE,
    JOINT,
    LATENTS,
    POOLED,
    STEP,
    TEXT,
    TOKENS,
    Case,
    filled,
    grid,
    kept,
    noise,
    share,
)

TWO_STREAMS: dict[str, Case] = {
    "FluxTransformer2DModel": (
        JOINT
        | {"in_channels": 8, "joint_attention_dim": 20, "pooled_projection_dim": 28}
        | {"guidance_embeds": True, "axes_dims_rope": AXES},
        TOKENS | TEXT | POOLED | FLOW | IDS | {"guidance": share(2)},
    ),
    "Flux2Transformer2DModel": (
        JOINT
        | {"in_channels": 8, "joint_attention_dim": 20, "timestep_guidance_channels": 32}
        | {"axes_dims_rope": (4, 4, 4, 4)},
        TOKENS
        | TEXT
        | FLOW
        | {"img_ids": grid(1, 3, 5, 1), "txt_ids": grid(1, 1, 1, 7), "guidance": share(2)},
    ),
    "SD3Transformer2DModel": (
        HEADS
        | LATENTS
        | {"sample_size": 8, "num_layers": 2, "joint_attention_dim": 20, "qk_norm": "rms_norm"}
        | {"caption_projection_dim": 48, "pooled_projection_dim": 28, "pos_embed_max_size": 6}
        | {"dual_attention_layers": (0,)},
        IMAGE | TEXT | POOLED | STEP,
    ),
    "AuraFlowTransformer2DModel": (
        HEADS
        | LATENTS
        | {"sample_size": 8, "num_mmdit_layers": 1, "num_single_dit_layers": 1}
        | {"joint_attention_dim": 20, "caption_projection_dim": 48, "pos_embed_max_size": 36},
        IMAGE | TEXT | FLOW,
    ),
    "ChromaTransformer2DModel": (
        JOINT
        | {"in_channels": 8, "joint_attention_dim": 20, "axes_dims_rope": AXES}
        | {"approximator_num_channels": 16, "approximator_hidden_dim": 32}
        | {"approximator_layers": 1},
        TOKENS | TEXT | FLOW | IDS | {"attention_mask": kept(22, 22, 19)},
    ),
    "HiDreamImageTransformer2DModel": (
        JOINT
        | LATENTS
        | {"patch_size": 2, "caption_channels": [20, 24], "text_emb_dim": 28}
        | {"axes_dims_rope": AXES, "max_resolution": (8, 8), "llama_layers": [0, 1]},
        {"hidden_states": noise(2, 4, 6, 6), "timesteps": share(2)}
        | {"encoder_hidden_states_t5": noise(2, 7, 20), "pooled_embeds": noise(2, 28)}
        | {"encoder_hidden_states_llama3": noise(2, 2, 5, 24)},
    ),
    "QwenImageTransformer2DModel": (
        HEADS
        | {"in_channels": 8, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 20}
        | {"axes_dims_rope": AXES},
        TOKENS
        | TEXT
        | FLOW
        | {"encoder_hidden_states_mask": kept(7, 7, 4), "img_shapes": [[(1, 3, 5)]] * 2},
    ),
    "BriaTransformer2DModel": (
        JOINT | {"in_channels": 8, "joint_attention_dim": 20, "axes_dims_rope": [*AXES]},
        TOKENS | TEXT | FLOW | IDS,
    ),
    "BriaFiboTransformer2DModel": (
        JOINT
        | {"in_channels": 8, "joint_attention_dim": 20, "axes_dims_rope": [*AXES]}
        | {"text_encoder_dim": 26},
        TOKENS | TEXT | FLOW | IDS | {"text_encoder_layers": [noise(2, 7, 26)] * 2},
    ),
    "CogView3PlusTransformer2DModel": (
        HEADS
        | LATENTS
        | {"num_layers": 1, "text_embed_dim": 20, "time_embed_dim": 24, "condition_dim": 16}
        | {"pos_embed_max_size": 8, "sample_size": 8},
        IMAGE
        | TEXT
        | STEP
        | {"original_size": filled(64.0, 2, 2), "target_size": filled(48.0, 2, 2)}
        | {"crop_coords": filled(3.0, 2, 2)},
    ),
    "CogView4Transformer2DModel": (
        HEADS
        | LATENTS
        | {"num_layers": 1, "text_embed_dim": 20, "time_embed_dim": 24, "condition_dim": 16}
        | {"pos_embed_max_size": 8, "sample_size": 8, "rope_axes_dim": (16, 16)},
        IMAGE
        | TEXT
        | STEP
        | {"original_size": filled(64.0, 2, 2), "target_size": filled(48.0, 2, 2)}
        | {"crop_coords": filled(3.0, 2, 2)},
    ),
    "Krea2Transformer2DModel": (
        HEADS
        | {"in_channels": 8, "num_layers": 1, "num_key_value_heads": 1, "intermediate_size": 64}
        | {"timestep_embed_dim": 32, "text_hidden_dim": 24, "num_text_layers": 5}
        | {"text_num_attention_heads": 4, "text_num_key_value_heads": 2}
        | {"text_intermediate_size": 40, "num_layerwise_text_blocks": 1}
        | {"num_refiner_text_blocks": 1, "axes_dims_rope": AXES},
        TOKENS
        | FLOW
        | {"encoder_hidden_states": noise(2, 7, 5, 24), "encoder_attention_mask": kept(7, 7, 4)}
        | {"position_ids": grid(1, 2, 11)},
    ),
}
