"""Tell whether a call runs inside a transform that only plain operations pass through."""

from __future__ import annotations

import torch


def transformed() -> bool:
    """Whether this call is inside ``torch.func.vmap``, ``grad`` and their kin, or is exported.

    The former know neither the fused kernels by their aten names nor the gradients that are written
    here for them. A program that ``torch.export`` or ``jit.trace`` writes shall run on any device,
    and become one for ONNX, which lacks these kernels, too.
    """
    if torch.compiler.is_dynamo_compiling():
        return False
    if torch.compiler.is_exporting():
        return True
    if torch.compiler.is_compiling():
        return False
    inside = torch._C._functorch.peek_interpreter_stack() is not None
    return inside or torch._C._get_tracing_state() is not None
