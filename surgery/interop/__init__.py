"""Run the code of models, torch and transformers: in isolation, and with parts of it replaced."""

from surgery.interop import encoder_fastpath, huggingface
from surgery.interop.arguments import (
    CONSTANT,
    detached,
    detached_copy,
    input_key,
    is_integer_tensor,
    leaves,
    map_leaves,
    named_arguments,
    snapshot,
    tensors_equal,
    tensors_in,
)
from surgery.interop.checkpointing import checkpointed_region
from surgery.interop.huggingface import without_checkpointing
from surgery.interop.isolation import (
    base_children,
    capture_running,
    capturing,
    differentiable,
    evaluating,
    frozen,
    hookless,
    outside_inference_mode,
    real_tensors,
    silenced,
    unspliced_forward,
    untouched,
)
from surgery.interop.offloading import (
    is_first_process,
    onloaded,
    out_of_reach,
    wait_for_others,
    whole,
)
from surgery.interop.patching import AttentionPatch, patch_lock, patched, unpatched

__all__ = [
    "CONSTANT",
    "AttentionPatch",
    "base_children",
    "capture_running",
    "capturing",
    "checkpointed_region",
    "detached",
    "detached_copy",
    "differentiable",
    "encoder_fastpath",
    "evaluating",
    "frozen",
    "hookless",
    "huggingface",
    "input_key",
    "is_first_process",
    "is_integer_tensor",
    "leaves",
    "map_leaves",
    "named_arguments",
    "onloaded",
    "out_of_reach",
    "outside_inference_mode",
    "patch_lock",
    "patched",
    "real_tensors",
    "silenced",
    "snapshot",
    "tensors_equal",
    "tensors_in",
    "unpatched",
    "unspliced_forward",
    "untouched",
    "wait_for_others",
    "whole",
    "without_checkpointing",
]
