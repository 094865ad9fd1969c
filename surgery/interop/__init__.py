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
)
from surgery.interop.checkpointing import checkpointed_region
from surgery.interop.huggingface import without_checkpointing
from surgery.interop.isolation import (
    capture_running,
    capturing,
    evaluating,
    hookless,
    real_tensors,
    silenced,
    untouched,
)
from surgery.interop.patching import AttentionPatch, patch_lock, patched, unpatched

__all__ = [
    "CONSTANT",
    "AttentionPatch",
    "capture_running",
    "capturing",
    "checkpointed_region",
    "detached",
    "detached_copy",
    "encoder_fastpath",
    "evaluating",
    "hookless",
    "huggingface",
    "input_key",
    "is_integer_tensor",
    "leaves",
    "map_leaves",
    "named_arguments",
    "patch_lock",
    "patched",
    "real_tensors",
    "silenced",
    "snapshot",
    "tensors_equal",
    "unpatched",
    "untouched",
    "without_checkpointing",
]
