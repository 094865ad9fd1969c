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
from surgery.interop.call_value import CallValue
from surgery.interop.checkpointing import checkpointed_region, in_backward, keep, kept
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
    unobserved,
    unspliced_forward,
    untouched,
)
from surgery.interop.library_inputs import example_inputs
from surgery.interop.offloading import explained_out_of_reach, onloaded, out_of_reach
from surgery.interop.patching import AttentionPatch, patch_lock, patched, unpatched
from surgery.interop.sharding import (
    is_first_process,
    is_sharded,
    like,
    shard_like,
    wait_for_others,
    whole,
)

__all__ = [
    "CONSTANT",
    "AttentionPatch",
    "CallValue",
    "base_children",
    "capture_running",
    "capturing",
    "checkpointed_region",
    "detached",
    "detached_copy",
    "differentiable",
    "encoder_fastpath",
    "evaluating",
    "example_inputs",
    "explained_out_of_reach",
    "frozen",
    "hookless",
    "huggingface",
    "in_backward",
    "input_key",
    "is_first_process",
    "is_integer_tensor",
    "is_sharded",
    "keep",
    "kept",
    "leaves",
    "like",
    "map_leaves",
    "named_arguments",
    "onloaded",
    "out_of_reach",
    "outside_inference_mode",
    "patch_lock",
    "patched",
    "real_tensors",
    "shard_like",
    "silenced",
    "snapshot",
    "tensors_equal",
    "tensors_in",
    "unobserved",
    "unpatched",
    "unspliced_forward",
    "untouched",
    "wait_for_others",
    "whole",
    "without_checkpointing",
]
