"""Call a fused kernel for its context and logsumexp, and differentiate both.

The mask is converted first (masks.py). A query that sees no key gets the logsumexp -inf.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgery.attention import kernels
from surgery.attention.kernel_trial import Trial, grouped_backward, trusted
from surgery.attention.kernels import Grads, Kernel, with_lse_gradient
from surgery.attention.masks import kernel_mask


class Fused(torch.autograd.Function):
    """A kernel's context and logsumexp as one node of autograd.

    ``blind`` marks the queries that see no key; the other arguments are those of a
    :class:`Kernel`. Gradients go to query, key and value.
    """

    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        blind: Tensor | None, dropout: float, is_causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        context, lse, state = kernel.forward(query, key, value, mask, dropout, is_causal, scale)
        ctx.save_for_backward(query, key, value, mask, context, lse)
        ctx.kernel, ctx.state, ctx.options = kernel, state, (dropout, is_causal, scale)
        return context, _blind_to_minus_inf(lse, blind)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, context, lse = ctx.saved_tensors
        grad, grad_lse = grads
        groups = query.shape[-3] // key.shape[-3]
        repeat = groups > 1 and not grouped_backward(
            ctx.kernel, query.device, query.dtype, query.shape[-1]
        )
        if repeat:
            key, value = (x.repeat_interleave(groups, -3) for x in (key, value))

        def run(*tensors: Tensor) -> Grads:
            grad, query, key, value, context = tensors
            result: Grads = ctx.kernel.backward(
                grad, query, key, value, mask, context, lse, ctx.state, *ctx.options
            )
            return result

        q, k, v = with_lse_gradient(run, grad, grad_lse, query, key, value, context)
        if repeat:
            k, v = (torch.unflatten(g, -3, (-1, groups)).sum(-3) for g in (k, v))
        return None, q, k, v, None, None, None, None, None


def fused_attention(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    dropout: float, is_causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute context and logsumexp by a kernel, with gradients where they are enabled.

    Shape: query (B, H, n, d), key (B, G, m, d), value (B, G, m, d)
        -> context (B, H, n, d), lse (B, H, n) in at least float32
    """
    mask, is_causal, blind = kernel_mask(mask, is_causal, query)
    options = (dropout, is_causal, scale)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        outputs: tuple[Tensor, Tensor] = Fused.apply(  # type: ignore[no-untyped-call]
            kernel, query, key, value, mask, blind, *options
        )
        return outputs
    context, lse, _ = kernel.forward(query, key, value, mask, *options)
    return context, _blind_to_minus_inf(lse, blind)


def flash_inference_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: Any
) -> tuple[Tensor, Tensor]:
    """Compute context and logsumexp by the CPU's kernel, without gradients, in the fewest steps."""
    mask, is_causal, blind = kernel_mask(mask, is_causal, query)
    context, lse = kernels.flash_on_cpu(
        query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    return context, _blind_to_minus_inf(lse, blind)


def _blind_to_minus_inf(lse: Tensor, blind: Tensor | None) -> Tensor:
    """Set the logsumexp of blind queries to -inf; some kernels return 0 for them."""
    return lse if blind is None else lse.masked_fill(blind, float("-inf"))


def usable(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, mask: Any, p: float) -> bool:
    """Whether calling this kernel ourselves gives what SDPA's call of it gives, with gradients.

    Args:
        mask: as SDPA takes it; its gradient would be lost.
        p: the dropout probability; on a CPU none is supported.
    """
    if key.shape[-3] != query.shape[-3] and not kernel.grouped:
        return False
    width = query.shape[-1]
    same = width == key.shape[-1] == value.shape[-1]
    if not same or (mask is not None and (not kernel.masks or mask.requires_grad)):
        return False
    if query.is_cpu:
        return p == 0.0
    trial = Trial(query.device, query.dtype, width, masked=mask is not None, dropping=p > 0)
    return width % kernel.multiple == 0 and trusted(kernel, trial)
