"""Tiny diffusers transformers for sound, and one for proteins."""

from __future__ import annotations

from tests.zoo.libraries.diffusers_parts import (
    FLOW,
    HEADS,
    MASKED_TEXT,
    TEXT,
    Case,
    Options,
    angles,
    fixed,
    kept,
    noise,
    share,
    whole,
)

WAVE: Options = {"hidden_states": noise(2, 8, 10)}
FRAMES: Options = {"hidden_states": noise(2, 10, 8)}
CUT = kept(5, 2, 5)

SOUNDS: dict[str, Case] = {
    "StableAudioDiTModel": (
        {"sample_size": 10, "in_channels": 8, "num_layers": 1, "attention_head_dim": 12}
        | {"num_attention_heads": 4, "num_key_value_attention_heads": 2, "out_channels": 8}
        | {"cross_attention_dim": 24, "time_proj_dim": 32, "global_states_input_dim": 28}
        | {"cross_attention_input_dim": 20},
        WAVE
        | TEXT
        | FLOW
        | {"global_hidden_states": noise(2, 1, 28), "rotary_embedding": angles(11, 6)},
    ),
    "StableAudio3DiTModel": (
        {"io_channels": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "cond_token_dim": 20}
        | {"global_cond_dim": 28, "local_add_cond_dim": 9, "timestep_features_dim": 32}
        | {"num_memory_tokens": 5},
        WAVE
        | MASKED_TEXT
        | FLOW
        | {"global_hidden_states": noise(2, 28), "local_add_cond": noise(2, 9, 10)},
    ),
    "AceStepTransformer1DModel": (
        {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
        | {"num_attention_heads": 3, "num_key_value_heads": 1, "in_channels": 20}
        | {"audio_acoustic_hidden_dim": 8, "sliding_window": 2, "encoder_hidden_size": 20},
        FRAMES | TEXT | FLOW | {"timestep_r": share(2), "context_latents": noise(2, 10, 12)},
    ),
    "LongCatAudioDiTTransformer": (
        {"dit_dim": 48, "dit_depth": 1, "dit_heads": 3, "dit_text_dim": 20, "latent_dim": 8}
        | {"ff_mult": 2.0},
        FRAMES
        | MASKED_TEXT
        | FLOW
        | {"attention_mask": kept(10, 10, 8), "latent_cond": noise(2, 10, 8)},
    ),
    "MiniMaxMusic3Transformer1DModel": (
        HEADS
        | {"in_channels": 8, "condition_dim": 20, "num_layers": 1, "ff_inner_dim": 64}
        | {"rotary_dim": 8, "fourier_embedding_dim": 32},
        WAVE | FLOW | {"encoder_hidden_states": noise(2, 10, 20)},
    ),
    "MiniMaxMusic3RVQDepthDecoder": (
        {"hidden_size": 48, "num_layers": 1, "num_attention_heads": 3, "intermediate_size": 64}
        | {"audio_vocab_size": 30, "num_codebooks": 4, "max_position_embeddings": 8},
        {"inputs_embeds": noise(2, 5, 48)},
    ),
    "T5FilmDecoder": (
        {"input_dims": 12, "targets_length": 9, "d_model": 48, "num_layers": 1, "num_heads": 3}
        | {"d_kv": 16, "d_ff": 64},
        {
            "encodings_and_masks": [
                (noise(2, 7, 48), kept(7, 7, 4)),
                (noise(2, 5, 48), kept(5, 2, 5)),
            ]
        }
        | {"decoder_input_tokens": noise(2, 9, 12), "decoder_noise_time": share(2)},
    ),
    "RFD4ProteinaTransformer": (
        {"nlayers": 2, "token_dim": 48, "nheads": 3, "dim_cond": 24, "pair_repr_dim": 20}
        | {"latent_dim": 8, "token_type_emb_dim": 10, "t_emb_dim": 32, "xt_pair_dist_dim": 6}
        | {"feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type")}
        | {"feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents", "recycle_remaining")}
        | {"feats_pair_repr": ("xt_bb_ca_pair_dists", "bond_mask", "molecule_idx_pair")}
        | {"tri_mult_c": 14, "num_sequence_classes": 17},
        {"bb_ca": noise(2, 11, 3), "local_latents": noise(2, 11, 8), "bb_ca_time": share(2)}
        | {"local_latents_time": share(2), "padding_mask": kept(11, 11, 9)}
        | {"token_type": whole(7, 2, 11), "recycle_depth": 2}
        | {
            "conditioning": {
                "is_in_context_conditioning": kept(11, 0, 3),
                "supports_local_latent": kept(11, 11, 11),
                "bond_mask": whole(3, 2, 11, 11),
                "molecule_iid": fixed([[0] * 6 + [1] * 5, [0] * 4 + [1] * 7]),
            }
        },
    ),
}
