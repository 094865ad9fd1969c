"""Run the code of models, torch and transformers: in isolation, and with parts of it replaced."""

from surgery.interop import encoder_fastpath, huggingface
from surgery.interop.arguments import (
    CONSTANT,
    by_name,
    detached,
    detached_copy,
    identity,
    is_whole,
    leaves,
    map_leaves,
    same,
    snapshot,
)
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
from surgery.interop.patching import AttentionPatch, one_at_a_time, patched, unpatched

__all__ = [
    "CONSTANT",
    "AttentionPatch",
    "by_name",
    "capture_running",
    "capturing",
    "detached",
    "detached_copy",
    "encoder_fastpath",
    "evaluating",
    "hookless",
    "huggingface",
    "identity",
    "is_whole",
    "leaves",
    "map_leaves",
    "one_at_a_time",
    "patched",
    "real_tensors",
    "same",
    "silenced",
    "snapshot",
    "unpatched",
    "untouched",
    "without_checkpointing",
]
