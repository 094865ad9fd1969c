"""Run the code of models, torch and transformers: in isolation, and with parts of it replaced."""

from surgery.interop import encoder_fastpath, huggingface, preference_trainers
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
from surgery.interop.call_facts import CALL_FACTS, tell_calls
from surgery.interop.call_value import CallValue
from surgery.interop.checkpointing import checkpointed_region, in_backward, keep, kept
from surgery.interop.huggingface import without_checkpointing
from surgery.interop.interrupts import deliver
from surgery.interop.isolation import (
    base_children,
    capture_running,
    capturing,
    differentiable,
    evaluating,
    every_module,
    hookless,
    on_trial,
    outside_inference_mode,
    put_items_back,
    real_tensors,
    silenced,
    unobserved,
    unspliced_forward,
    untouched,
    untraced,
)
from surgery.interop.library_inputs import example_inputs
from surgery.interop.offloading import (
    explained_out_of_reach,
    onloaded,
    out_of_reach,
    stored_parameters,
)
from surgery.interop.packed_weights import keep_unpacked, require_unpacked
from surgery.interop.patching import AttentionPatch, exclusively, patched, unpatched
from surgery.interop.random_streams import draw_anew
from surgery.interop.sharding import (
    is_first_process,
    is_partitioned,
    is_sharded,
    joined,
    like,
    shard_like,
    wait_for_others,
    whole,
)
from surgery.interop.tensor_parallel import (
    any_process,
    divide_parameters,
    division_mesh,
    is_divided_by_plan,
    own_part,
    sum_between,
    undivided,
)
from surgery.interop.thread_state import LeftOnce, keeping_thread_state
from surgery.interop.trainer_decay import spare_from_decay
from surgery.interop.updated_weights import updated_weight

__all__ = [
    "CALL_FACTS",
    "CONSTANT",
    "AttentionPatch",
    "CallValue",
    "LeftOnce",
    "any_process",
    "base_children",
    "capture_running",
    "capturing",
    "checkpointed_region",
    "deliver",
    "detached",
    "detached_copy",
    "differentiable",
    "divide_parameters",
    "division_mesh",
    "draw_anew",
    "encoder_fastpath",
    "evaluating",
    "every_module",
    "example_inputs",
    "exclusively",
    "explained_out_of_reach",
    "hookless",
    "huggingface",
    "in_backward",
    "input_key",
    "is_divided_by_plan",
    "is_first_process",
    "is_integer_tensor",
    "is_partitioned",
    "is_sharded",
    "joined",
    "keep",
    "keep_unpacked",
    "keeping_thread_state",
    "kept",
    "leaves",
    "like",
    "map_leaves",
    "named_arguments",
    "on_trial",
    "onloaded",
    "out_of_reach",
    "outside_inference_mode",
    "own_part",
    "patched",
    "preference_trainers",
    "put_items_back",
    "real_tensors",
    "require_unpacked",
    "shard_like",
    "silenced",
    "snapshot",
    "spare_from_decay",
    "stored_parameters",
    "sum_between",
    "tell_calls",
    "tensors_equal",
    "tensors_in",
    "undivided",
    "unobserved",
    "unpatched",
    "unspliced_forward",
    "untouched",
    "untraced",
    "updated_weight",
    "wait_for_others",
    "whole",
    "without_checkpointing",
]
