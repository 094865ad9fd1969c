"""Tell whether a call runs inside a transform that only plain operations pass through."""

from __future__ import annotations

import torch


def transformed() -> bool:
    """Whether this call is inside ``torch.func.vmap``, ``grad`` and their kin, or ``jit.trace``.

    These know neither the fused kernels by their aten names nor the gradients that are written
    here for them.
    """
    if torch.compiler.is_compiling():
        return False
    inside = torch._C._functorch.peek_interpreter_stack() is not None
    return inside or torch._C._get_tracing_state() is not None
