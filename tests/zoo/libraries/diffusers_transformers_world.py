"""Tiny diffusers transformers for videos, of the models that came from late 2025 on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.zoo.libraries.diffusers_parts import (
    AXES,
    FLOAT_STEP,
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
    filled,
    fixed,
    grid,
    kept,
    noise,
    share,
    steps,
    whole,
)

WAN: Options = HEADS | LATENTS | {"text_dim": 20, "freq_dim": 32, "ffn_dim": 64, "num_layers": 1}
FRAMES_FIRST: Options = {"hidden_states": noise(2, 2, 4, 8, 4)}
PATCHES: Options = {"hidden_states": noise(2, 12, 8)}
TEXT_2: Options = {
    "encoder_hidden_states_2": noise(2, 5, 26),
    "encoder_attention_mask_2": kept(5, 2, 5),
}
LTX2: Options = (
    HEADS
    | {"in_channels": 8, "out_channels": 8, "cross_attention_dim": 48, "audio_in_channels": 6}
    | {"audio_out_channels": 6, "audio_num_attention_heads": 3, "audio_attention_head_dim": 8}
    | {"audio_cross_attention_dim": 24, "num_layers": 1, "caption_channels": 20}
    | {"gated_attn": True, "cross_attn_mod": True}
    | {"audio_gated_attn": True, "audio_cross_attn_mod": True}
)


def cameras() -> Tensor:
    """For each row and frame a pose, 4 by 4, and the focal lengths and centre of a lens."""
    skew = torch.randn(2, 2, 3, 3)
    pose = torch.eye(4).repeat(2, 2, 1, 1)
    pose[..., :3, :3] = torch.linalg.matrix_exp(skew - skew.mT)
    pose[..., :3, 3] = torch.randn(2, 2, 3)
    return torch.cat([pose.flatten(2), torch.tensor([3.0, 3.0, 1.0, 1.5]).expand(2, 2, 4)], -1)


def animate_cache() -> Any:
    """An empty cache of one layer."""
    from diffusers.models.transformers import transformer_wan_animate_2

    return transformer_wan_animate_2.WanAnimate2KVCache(1)


WORLDS: dict[str, Case] = {
    "WanVACETransformer3DModel": (
        WAN | {"num_layers": 2, "vace_layers": [0], "vace_in_channels": 6},
        VIDEO | TEXT | STEP | {"control_hidden_states": noise(2, 6, 2, 6, 4)},
    ),
    "WanAnimateTransformer3DModel": (
        WAN
        | {"in_channels": 12, "latent_channels": 4, "image_dim": None, "motion_encoder_size": 8}
        | {"motion_encoder_channel_sizes": {"4": 10, "8": 14}, "motion_style_dim": 18}
        | {"motion_dim": 5, "motion_encoder_dim": 22, "face_encoder_hidden_dim": 26}
        | {"face_encoder_num_heads": 4, "inject_face_latents_blocks": 1},
        TEXT
        | STEP
        | {"hidden_states": noise(2, 12, 2, 6, 4), "pose_hidden_states": noise(2, 4, 1, 6, 4)}
        | {"face_pixel_values": noise(2, 3, 4, 8, 8)},
    ),
    "WanAnimate2Transformer3DModel": (
        {"text_len": 7, "in_dim": 12, "dim": 48, "ffn_dim": 64, "freq_dim": 32, "text_dim": 20}
        | {"out_dim": 4, "num_heads": 3, "num_layers": 1},
        STEP
        | {"hidden_states": [noise(4, 2, 6, 4)] * 2, "condition_latents": [noise(8, 2, 6, 4)] * 2}
        | {"encoder_hidden_states": [noise(7, 20), noise(4, 20)], "kv_cache": animate_cache}
        | {"kv_cache_mode": "extract", "seq_len": 12, "offset_grid_sizes": fixed([[2, 3, 2]])}
        | {"encoder_hidden_states_image": noise(2, 5, 1280)},
    ),
    "ChronoEditTransformer3DModel": (WAN, VIDEO | TEXT | STEP),
    "AnyFlowTransformer3DModel": (
        WAN,
        FRAMES_FIRST | TEXT | {"timestep": share(2, 2), "r_timestep": share(2, 2)},
    ),
    "AnyFlowFARTransformer3DModel": (
        WAN | {"full_chunk_limit": 1, "chunk_partition": (1, 1)},
        FRAMES_FIRST
        | TEXT
        | {"timestep": share(2, 2), "r_timestep": share(2, 2), "chunk_partition": [1, 1]},
    ),
    "HeliosTransformer3DModel": (
        WAN | {"rope_dim": AXES, "is_amplify_history": True},
        VIDEO
        | TEXT
        | STEP
        | {"indices_hidden_states": fixed([[7, 8]] * 2)}
        | {"indices_latents_history_short": fixed([[6]] * 2)}
        | {"indices_latents_history_mid": fixed([[4, 5]] * 2)}
        | {"indices_latents_history_long": fixed([[0, 1, 2, 3]] * 2)}
        | {"latents_history_short": noise(2, 4, 1, 6, 4)}
        | {"latents_history_mid": noise(2, 4, 2, 6, 4)}
        | {"latents_history_long": noise(2, 4, 4, 6, 4)},
    ),
    "CosmosTransformer3DModel": (
        HEADS
        | LATENTS
        | {"num_layers": 1, "text_embed_dim": 20, "adaln_lora_dim": 10, "max_size": (4, 8, 8)}
        | {"concat_padding_mask": False},
        VIDEO | TEXT | FLOW | {"attention_mask": kept(7, 7, 4), "fps": 16},
    ),
    "Cosmos3OmniTransformer": (
        {"head_dim": 16, "hidden_size": 48, "intermediate_size": 64, "latent_channel": 4}
        | {"num_attention_heads": 3, "num_hidden_layers": 2, "num_key_value_heads": 1}
        | {"patch_latent_dim": 16, "vocab_size": 50, "rope_axes_dim": [3, 3, 2]}
        | {"action_dim": 5, "action_gen": True, "num_embodiment_domains": 4}
        | {"sound_dim": 6, "sound_gen": True},
        {"input_ids": whole(50, 7), "text_indexes": steps(7), "position_ids": whole(20, 3, 27)}
        | {"und_len": 7, "sequence_length": 27, "vision_tokens": [noise(1, 4, 2, 4, 6)]}
        | {"vision_token_shapes": [(2, 2, 3)], "vision_sequence_indexes": fixed([*range(7, 19)])}
        | {"vision_mse_loss_indexes": fixed([*range(13, 19)])}
        | {"vision_timesteps": filled(300.0, 6), "vision_noisy_frame_indexes": [fixed([1])]}
        | {"sound_tokens": [noise(6, 5)], "sound_token_shapes": [(5, 1, 1)]}
        | {"sound_sequence_indexes": fixed([*range(19, 24)])}
        | {"sound_mse_loss_indexes": fixed([*range(19, 24)])}
        | {"sound_timesteps": filled(500.0, 5), "sound_noisy_frame_indexes": [steps(5)]}
        | {"action_tokens": [noise(3, 5)], "action_token_shapes": [(3, 1, 1)]}
        | {"action_sequence_indexes": fixed([24, 25, 26])}
        | {"action_mse_loss_indexes": fixed([24, 25, 26])}
        | {"action_timesteps": filled(700.0, 3), "action_noisy_frame_indexes": [steps(3)]}
        | {"action_domain_ids": [fixed(2)]},
    ),
    "HunyuanVideo15Transformer3DModel": (
        HEADS
        | LATENTS
        | {"num_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 20, "use_meanflow": True}
        | {"text_embed_2_dim": 26, "image_embed_dim": 18, "rope_axes_dim": AXES},
        MASKED_TEXT
        | TEXT_2
        | FLOAT_STEP
        | {"hidden_states": noise(2, 4, 2, 3, 2), "timestep_r": fixed([20.0, 500.0])}
        | {"image_embeds": noise(2, 3, 18)},
    ),
    "HunyuanVideoFramepackTransformer3DModel": (
        JOINT
        | LATENTS
        | {"num_refiner_layers": 1, "text_embed_dim": 20, "pooled_projection_dim": 28}
        | {"rope_axes_dim": AXES, "has_image_proj": True, "image_proj_dim": 18}
        | {"has_clean_x_embedder": True},
        VIDEO
        | MASKED_TEXT
        | POOLED
        | STEP
        | {"guidance": share(2), "image_embeds": noise(2, 3, 18)}
        | {"indices_latents": fixed([7, 8]), "indices_latents_clean": fixed([6])}
        | {"indices_latents_history_2x": fixed([4, 5]), "latents_clean": noise(2, 4, 1, 6, 4)}
        | {"indices_latents_history_4x": steps(4), "latents_history_2x": noise(2, 4, 2, 6, 4)}
        | {"latents_history_4x": noise(2, 4, 4, 6, 4)},
    ),
    "Kandinsky6Transformer3DModel": (
        {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 20, "in_text_dim2": 28}
        | {"time_dim": 24, "model_dim": 48, "ff_dim": 64, "num_text_blocks": 1}
        | {"num_visual_blocks": 1, "axes_dims": AXES, "in_audio_dim": 5, "out_audio_dim": 5}
        | {"model_dim_a": 32, "ff_dim_a": 40, "axes_dims_a": AXES}
        | {"cross_gates": True, "visual_token_type_num_embeddings": 3},
        TEXT
        | POOLED
        | FLOW
        | {"hidden_states": noise(2, 2, 6, 4, 9), "audio_hidden_states": noise(2, 5, 5)}
        | {"encoder_attention_mask": kept(7, 7, 4)}
        | {"visual_token_type_ids": fixed([[0, 1], [0, 2]])},
    ),
    "Kandinsky6SRTransformer3DModel": (
        {"in_visual_dim": 4, "out_visual_dim": 6, "time_dim": 24, "model_dim": 48, "ff_dim": 64}
        | {"num_visual_blocks": 1, "axes_dims": AXES, "nabla_window": (1, 1, 1)},
        FLOW | {"hidden_states": noise(2, 2, 8, 8, 9)},
    ),
    "LTX2VideoTransformer3DModel": (
        LTX2,
        PATCHES
        | MASKED_TEXT
        | STEP
        | {"audio_hidden_states": noise(2, 5, 6), "audio_encoder_hidden_states": noise(2, 7, 20)}
        | {"audio_encoder_attention_mask": kept(7, 7, 4), "sigma": share(2)}
        | {"num_frames": 2, "height": 3, "width": 2, "audio_num_frames": 5},
    ),
    "SanaWMLTX2RefinerTransformer3DModel": (
        LTX2 | {"cross_attn_mod": False, "audio_cross_attn_mod": False},
        PATCHES | MASKED_TEXT | STEP | {"video_rotary_emb": angles(2, 12, 48)},
    ),
    "SanaVideoTransformer3DModel": (
        HEADS
        | LATENTS
        | {"num_layers": 1, "num_cross_attention_heads": 4, "cross_attention_head_dim": 12}
        | {"cross_attention_dim": 48, "caption_channels": 20, "sample_size": 8},
        VIDEO | MASKED_TEXT | STEP,
    ),
    "SanaWMTransformer3DModel": (
        {"in_channels": 4, "num_layers": 2, "hidden_size": 48, "num_attention_heads": 3}
        | {"softmax_every_n": 2, "linear_head_dim": 16, "chunk_plucker_channels": 6}
        | {"chunk_plucker_post_attn_blocks": 2, "image_size": 8, "caption_channels": 20}
        | {"mlp_ratio": 2.0},
        MASKED_TEXT
        | {"timestep": fixed([[[0, 300]], [[0, 700]]]), "camera_conditions": cameras}
        | {"hidden_states": noise(2, 4, 2, 3, 2)}
        | {"chunk_plucker": noise(2, 6, 2, 3, 2)},
    ),
    "MiniMaxH3Transformer3DModel": (
        HEADS
        | {"hidden_size": 40, "num_layers": 1, "num_refiner_layers": 1, "ffn_dim": 64}
        | {"in_channels": 4, "audio_in_channels": 6, "text_dim": 20, "freq_dim": 32}
        | {"time_embed_hidden_dim": 24, "time_embed_dim": 18, "rope_freq_dim": 2},
        TEXT
        | {"hidden_states": noise(2, 12, 16), "audio_hidden_states": noise(2, 5, 6)}
        | {"timestep": fixed([0.0, 700.0]), "timestep_indices": fixed([0] * 7 + [1] * 17)}
        | {"token_tags": fixed([0] * 7 + [1] * 12 + [2] * 5), "position_ids": grid(2, 3, 4)}
        | {"video_indices": fixed([*range(7, 19)]), "text_indices": steps(7)}
        | {"audio_indices": fixed([*range(19, 24)])},
    ),
    "MotifVideoTransformer3DModel": (
        JOINT
        | LATENTS
        | {"num_single_layers": 2, "num_decoder_layers": 1, "text_embed_dim": 20}
        | {"image_embed_dim": 18, "rope_axes_dim": AXES}
        | {"enable_text_cross_attention_dual": True, "enable_text_cross_attention_single": True},
        VIDEO | MASKED_TEXT | STEP | {"image_embeds": noise(2, 3, 18)},
    ),
}
