"""Tell a forward that gradient checkpointing repeats from the first run of the same forward.

Both kinds of checkpointing run a function twice: forwards, and again in the backward pass. Both
keep one object from the first run for the second, which the call stack shows:

    reentrant       the ``ctx`` of the autograd function
    non-reentrant   the frame object that ``torch.utils.checkpoint`` packs its tensors into

That object is where what the first run decided is kept for the second.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import _CheckpointFrame

_CHECKPOINT_FILE = torch.utils.checkpoint.__file__
_FORWARD_OR_BACKWARD = ("forward", "backward")


def in_backward() -> bool:
    """Whether this thread runs a backward pass, in which checkpointing repeats forwards.

    Example:
        >>> surgery.in_backward()
        False
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def keep(key: Hashable, value: Any) -> None:
    """Keep a value for when gradient checkpointing repeats the function that runs now."""
    region = checkpointed_region()
    if region is not None:
        region[key] = value


def kept(key: Hashable, default: Any) -> Any:
    """Return what the first run of the function that is repeated now has kept.

    Args:
        key: what it was kept under.
        default: the answer where nothing is repeated.

    Returns:
        None if something is repeated, and its first run kept nothing.
    """
    regions = list(_regions()) if in_backward() else []
    for region in regions:
        if key in region:
            regions[0][key] = region[key]  # a checkpoint inside this one is repeated again
            return region[key]
    return None if regions else default


def checkpointed_region() -> dict[Any, Any] | None:
    """Return what is kept for the checkpointed function that runs now; None if none does.

    The dictionary is the same in the first run of a function and when it is repeated, and goes with
    the autograd graph.
    """
    return next(_regions(), None)


def _regions() -> Iterator[dict[Any, Any]]:
    """Yield what is kept for each checkpointed function that runs now, the innermost first."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        keeper = _keeper(frame)
        if keeper is not None:
            yield vars(keeper).setdefault("_surgery_kept", {})
        frame = frame.f_back


def _keeper(frame: Any) -> Any:
    """Return the object that lives from a function's first run to its repetition."""
    name, code = frame.f_code.co_name, frame.f_code
    if name in _FORWARD_OR_BACKWARD and code.co_varnames[:1] == ("ctx",):
        ctx = frame.f_locals["ctx"]
        is_checkpoint = "run_function" in code.co_varnames or hasattr(ctx, "run_function")
        is_context = isinstance(ctx, torch.autograd.function.FunctionCtx)
        return ctx if is_checkpoint and is_context else None
    if code.co_filename == _CHECKPOINT_FILE and "gen" in code.co_varnames:
        generator = frame.f_locals.get("gen")
        suspended = getattr(generator, "gi_frame", None)
        return None if suspended is None else suspended.f_locals.get("new_frame")
    if name == "unpack_hook":
        found = frame.f_locals.get("frame")
        return found if isinstance(found, _CheckpointFrame) else None
    return None
