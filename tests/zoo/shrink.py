"""Shrink any transformers config by the names of its fields, keeping what must divide.

small_config(LlamaConfig(), SHRINKS[0])      # 2 layers of width 32, 4 heads, 2 of them kv
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

VOCAB, FIRST_TEXT = 128, 64  # ids below FIRST_TEXT are left to special tokens


@dataclass(frozen=True)
class Shrink:
    """One way to shrink: sizes to set, or (``divide``) a number to divide all widths by."""

    width: int = 32
    heads: int = 4
    kv_heads: int = 2
    layers: int = 2
    image: int = 32
    divide: int = 0
    mrope: bool = False  # give every rotary encoding sections, for models whose default is too wide
    derived: bool = False  # shrink what a config derives, too, in place of deriving it anew
    widths: bool = True  # False: only layers, vocabulary and images shrink


SHRINKS = (
    Shrink(),
    Shrink(kv_heads=4),
    Shrink(width=64, image=64),
    Shrink(mrope=True),
    Shrink(width=64, mrope=True),
    Shrink(derived=True, image=64),
    Shrink(divide=16, image=64),
    Shrink(divide=8, layers=4, image=64),
    Shrink(divide=4, layers=4, image=224),
    Shrink(widths=False, image=64),
    Shrink(widths=False, layers=4, image=224),
)

# Values for fields that default to None although some models need one.
NEEDED = {
    "prediction_length": lambda s: 4,
    "vocab_size": lambda s: VOCAB,
    "n_routed_experts": lambda s: 4,
    "num_experts_per_tok": lambda s: 2,
    "num_key_value_heads": lambda s: s.kv_heads,
    "head_dim": lambda s: s.width // s.heads,
    "image_token_index": lambda s: 50,
    "image_token_id": lambda s: 50,
    "mlp_layer_types": lambda s: (["dense"] + ["sparse"] * s.layers)[: s.layers],
    "pad_token_id": lambda s: 1,
    "n_shared_experts": lambda s: 1,
    "attn_layer_indices": lambda s: [1],
    "n_group": lambda s: 1,
    "topk_group": lambda s: 1,
}

_LAYERS = r"(layers?|depth|_blocks?|num_blocks|n_attn_blocks|num_self_attends_per_block)$"
_NOT_LAYERS = (
    r"feat_extract|conv_layers|max_window|kv_shared|block_repeats|random|mlp_only|feature_layer|"
    r"postnet|prenet|no_rope|csp|first_n|flow|iou|res_blocks|nextn|lstm"
)
_HEADS = r"(attention_heads|num_heads|n_heads?|_heads|heads|query_groups)$"
_HEAD_DIM = r"(head_dim|head_size|dim_head|d_kv|kv_channels|d_head|headdim)$"
_WIDTH = (
    r"(hidden_size\w*|d_model|dim|\w*_dim|embed\w*|n_embd|\w*hidden\w*|emb_size|\w*_width|width|"
    r"\w*projection_size|lora_rank|channels|d_latents|feature_size|\w*embedding_size|tdnn_dim|"
    r"\w*_channels|\w*_filters|\w*dims?|\w*_hidden_sizes?|\w*_units|lru_width)$"
)
_NOT_WIDTH = (
    r"^(num|in|bbox|max|mel)_|^(audio|input|image|raw)_channels|_layers|kernel|act|fn|state|"
    r"mel_|drop|expan|hidden_scale|position|pos_"
)
_FFN = (
    r"(intermediate|ffn_dim|d_ff|dff|mlp_dim|inner_dim|ffn_hidden|n_inner|feedforward_size|"
    r"feed_forward_size|filter_size|dim_feedforward)"
)


def small_config(config: Any, shrink: Shrink) -> Any:
    """A config of the same class with every size in it shrunk; derived fields are derived anew."""
    cls = type(config)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    kinds = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    try:
        usual = vars(cls())
    except Exception:  # some can be made only with arguments
        usual = {}
    layers = _kept_layers(kinds, shrink)
    given: dict[str, Any] = {}
    for name, value in kinds.items():
        derived = name in fields and fields[name].default is None and usual.get(name) == value
        derived = derived and not shrink.derived
        if hasattr(value, "to_diff_dict"):
            given[name] = small_config(_without_timm(value), shrink)
        elif isinstance(value, list) and value and all(hasattr(v, "to_diff_dict") for v in value):
            given[name] = [small_config(v, shrink) for v in value]
        elif layers.original and _per_layer(name, value, layers.original):
            given[name] = [value[i] for i in layers.kept]
        elif value is None and name in fields and name in NEEDED and not shrink.divide:
            given[name] = NEEDED[name](shrink)
        elif (name in fields and not derived) or (name not in fields and name not in usual):
            given[name] = small_value(name, value, shrink, kinds, len(layers.kept))
        elif "rope_parameters" in name and isinstance(value, dict):
            given[name] = _small_rope(value, shrink)
    indices = vars(config).get("_out_indices")
    if indices and indices != usual.get("_out_indices"):
        last = len(layers.kept)
        start = last + 1 - len(indices)
        shifted = [max(start + i, 0) for i in range(len(indices))]
        given["out_indices"] = shifted if layers.original else list(indices)
    for name in ("is_decoder", "add_cross_attention"):
        if name in kinds:
            given[name] = kinds[name]
    return cls(**{k: v for k, v in given.items() if k not in ("id2label", "label2id", "dtype")})


@dataclass(frozen=True)
class _Layers:
    original: int
    kept: list[int]


def _kept_layers(kinds: dict[str, Any], shrink: Shrink) -> _Layers:
    """Which layers to keep: at least one of every sort that a per-layer list names."""
    numbers = [
        kinds[n] for n in ("num_hidden_layers", "n_layer", "num_layers", "depth") if n in kinds
    ]
    n = next((x for x in numbers if isinstance(x, int)), 0)
    if n <= shrink.layers:
        return _Layers(0, list(range(shrink.layers)))
    lists = [v for k, v in kinds.items() if _per_layer(k, v, n)]
    seen: set[Any] = set()
    kept = []
    for i in range(n):
        sorts = {(j, str(v[i])) for j, v in enumerate(lists)}
        if not sorts <= seen and len(kept) < 6:
            kept.append(i)
            seen |= sorts
    kept += [i for i in range(n) if i not in kept][: max(0, shrink.layers - len(kept))]
    return _Layers(n, sorted(kept))


def _per_layer(name: str, value: Any, n: int) -> bool:
    if n <= 2 or not isinstance(value, (list, tuple)) or len(value) != n or "stage" in name:
        return False
    return all(isinstance(v, (str, bool)) for v in value) or n > 6 or "layer" in name


def _without_timm(config: Any) -> Any:
    """timm is not there: a vision model of transformers' own takes the place of one of timm's."""
    from transformers import ResNetConfig, ViTConfig

    if config.model_type == "timm_wrapper":
        return ViTConfig()
    if config.model_type != "timm_backbone":
        return config
    wanted = vars(config).get("_out_indices") or [4]
    return ResNetConfig(out_indices=[max(1, i % 5) for i in wanted])


def small_value(name: str, v: Any, s: Shrink, kinds: dict[str, Any], layers: int) -> Any:
    """The value for a field of this name."""
    if isinstance(v, dict):
        if "rope" in name:
            return _small_rope(v, s)
        return {k: small_value(str(k), x, s, kinds, layers) for k, x in v.items()}
    if isinstance(v, (list, tuple)) and v and all(type(x) in (int, list, tuple) for x in v):
        if re.search(r"(index|indices|indexes|_ids|layers?|indx|blocks?)$", name) and not re.search(
            "token|stage|num_|repeats", name
        ):
            return type(v)(dict.fromkeys(max(0, layers - len(v) + i) for i in range(len(v))))
        return type(v)(small_value(name, x, s, kinds, layers) for x in v)
    if type(v) is not int:
        return v
    if re.search(
        r"(token|bos|eos|pad|patch|begin|codec\w*)_(id|index|ids)s?$|^(eos|bos|pad)", name
    ):
        return v if v < 40 else 40 + sum(map(ord, name)) % 24
    if re.search(r"vocab_size|num_embeddings|embeds$", name):
        return min(v, VOCAB)
    if re.search(_LAYERS, name) and not re.search(_NOT_LAYERS, name):
        return min(v, layers)
    if re.search(r"depths|stage_num_blocks|n_blocks", name):
        return min(v, 2)
    if re.search(r"max_window_layers|dense_replace|num_dense_layers|_offset$|kv_shared", name):
        return min(v, 1)
    if re.search(r"(period|interval|frequency|pattern|every|sparse_step)$", name):
        return min(v, 2)
    if re.search(r"(image|img|input)_(size|resolution)$|^resolution$|spatial_shapes", name):
        return min(v, s.image)
    if re.search(r"max_source_positions", name):
        return min(v, 16)
    if not s.widths:
        return v
    if re.search(r"(left|right)_context$", name):
        return min(v, 1)
    if re.search(r"patch_size$", name):
        return min(v, 8)
    if v == 0:
        return v
    if name == "window_size" and "spatial_merge_size" in kinds:  # in pixels
        return min(v, 32)
    if re.search(r"(sliding|window|chunk_(length|size)|block_size|index_topk)", name):
        return min(v, 4)
    if re.search(r"expert|routed|topk|moe_k|group", name) and "size" not in name:
        wanted = 2 if re.search(r"per_tok|top_?k|moe_k", name) else 4
        wanted = 1 if re.search(r"n_group|topk_group|expert_group|shared", name) else wanted
        return min(v, wanted) if s.divide == 0 or "expert" in name else v
    if s.divide and re.search(f"{_WIDTH}|{_HEAD_DIM}|{_FFN}", name):
        return v if v < 32 or re.search(_NOT_WIDTH, name) else max(v // s.divide, 4)
    if s.divide:
        return v
    if re.search(r"(kv_heads|key_value_heads|_kv|key_value_attention_heads)$", name):
        return min(v, s.kv_heads)
    if re.search(_HEADS, name):
        return min(v, s.heads)
    if re.search(r"mamba_(d_head|head_dim|headdim)", name):
        return s.width * 2 // s.heads
    if re.search(r"index_head_dim|qk_head_dim", name):
        return s.width // s.heads * 2
    if re.search(_HEAD_DIM, name):
        return min(v, s.width // s.heads)
    if re.search(_FFN, name):
        return min(v, 2 * s.width)
    if re.search(_WIDTH, name) and not re.search(_NOT_WIDTH, name):
        return min(v, s.width)
    return v


def _small_rope(v: dict[str, Any], s: Shrink) -> dict[str, Any]:
    """Rope parameters: sections and factors that add up to half of the smaller head width."""
    out = {k: _small_rope(x, s) if isinstance(x, dict) else x for k, x in v.items()}
    if not s.widths or s.divide:
        return out
    half = int(s.width // s.heads * (v.get("partial_rotary_factor") or 1)) // 2
    if "mrope_section" in out or (s.mrope and "rope_theta" in out):
        out["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    for key in ("short_factor", "long_factor"):
        if key in out:
            out[key] = out[key][:half]
    return out
