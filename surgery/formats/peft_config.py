"""Say what a PEFT config asks for: which of its options have a place here, ranks and scales.

An option that changes the mathematics and has no place here is refused by name. Which modules are
meant is told by the names of the tensors, so ``target_modules`` and its relatives are never run;
the patterns of ranks and scales are, if they end soon.
"""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

from surgery.errors import shown
from surgery.formats.foreign import Foreign, option
from surgery.plugin import are_quick_patterns

_ANYWHERE = (
    "auto_mapping base_model_name_or_path exclude_modules inference_mode peft_type peft_version "
    "revision target_modules task_type modules_to_save fan_in_fan_out"
).split()
_KNOWN = {
    "LORA": "r lora_alpha lora_dropout bias lora_bias use_rslora rank_pattern alpha_pattern "
    "layers_to_transform layers_pattern init_lora_weights trainable_token_indices loftq_config "
    "eva_config megatron_core qalora_group_size ensure_weight_tying target_parameters "
    "use_dora",
    "IA3": "feedforward_modules init_ia3_weights",
    "PREFIX_TUNING": "num_virtual_tokens token_dim num_layers num_attention_heads "
    "num_transformer_submodules prefix_projection encoder_hidden_size init_weights",
    "PROMPT_TUNING": "num_virtual_tokens token_dim num_layers num_attention_heads "
    "num_transformer_submodules prompt_tuning_init prompt_tuning_init_text "
    "prompt_tuning_init_state_dict_path tokenizer_name_or_path tokenizer_kwargs",
    "P_TUNING": "num_virtual_tokens token_dim num_layers num_attention_heads "
    "num_transformer_submodules encoder_hidden_size encoder_num_layers encoder_dropout "
    "encoder_reparameterization_type",
}
_REFUSED = {
    "use_qalora": "QALoRA pools its input",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "layer_replication": "it builds another base of repeated layers; build that base first",
    "alora_invocation_tokens": "aLoRA acts from certain tokens on",
    "arrow_config": "Arrow routes tokens among adapters",
    "monteclora_config": "it samples its weights",
    "velora_config": "VeLoRA compresses activations in training",
    "megatron_config": "its layers are Megatron's",
}
# What starts from a decomposition leaves another base behind, unless it was converted when saved.
_OWN_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "kasa")


def require_known(adapter: Foreign) -> str:
    """Return the ``peft_type`` of an adapter whose options all have a place here.

    Raises:
        StoreError: the method, or an option that is set, has no place here; it is named.
    """
    kind = adapter.config.get("peft_type")
    if not isinstance(kind, str) or kind not in _KNOWN:
        raise adapter.refuse(
            f"its peft_type is {shown(kind)}. What has a place here: {', '.join(_KNOWN)}. Merge it "
            "into its base with PEFT's merge_and_unload, where that method can."
        )
    for name, why in _REFUSED.items():
        if adapter.config.get(name):
            raise adapter.refuse(f"its config has {name}={shown(adapter.config[name])}: {why}.")
    start = adapter.config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_OWN_BASE):
        raise adapter.refuse(
            f"init_lora_weights={start!r} has changed the weights of its base. Save it with PEFT's "
            "path_initial_model_for_weight_conversion=, which makes a plain LoRA of it."
        )
    known = {*_ANYWHERE, *_KNOWN[kind].split(), *_REFUSED}
    unknown = [n for n, value in adapter.config.items() if n not in known and value]
    if unknown:
        warnings.warn(
            f"the adapter in {adapter.where} has options that are unknown here: "
            f"{shown(unknown)}. They are passed over.",
            stacklevel=5,
        )
    return kind


def pattern(adapter: Foreign, name: str) -> dict[str, Any]:
    """Return ``rank_pattern`` or ``alpha_pattern``: numbers by patterns of paths.

    Raises:
        StoreError: a value is no number > 0, or a pattern may take for ever.
    """
    found: dict[str, Any] = option(adapter, name, {}, dict)
    if not all(is_positive(value) for value in found.values()):
        raise adapter.refuse(f"its config has {name}={shown(found)}; numbers > 0 must stand there.")
    if not are_quick_patterns(map(_whole, found)):
        raise adapter.refuse(
            f"{name} has a pattern that may take for ever: {shown(list(found))}. Name the modules "
            "by their paths instead."
        )
    return found


def is_positive(value: Any) -> bool:
    """Whether this is a finite number > 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value < 2**31 and math.isfinite(value)


def matched(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """Return the value of the first pattern that a path ends with, as PEFT chooses it."""
    found = (v for p, v in patterns.items() if re.search(_whole(p), path))
    return next(found, default)


def _whole(pattern: str) -> str:
    """Return what finds the paths that PEFT finds by ``(.*\\.)?(pattern)$``."""
    return rf"(?:^|\.)(?:{pattern})$"
