"""Fused: a kernel's context and logsumexp as one differentiable function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgery.attention import kernels
from surgery.attention.kernel_trial import Trial, grouped_backward, trusted
from surgery.attention.kernels import Grads, Kernel, with_lse_gradient
from surgery.attention.masks import kernel_mask


class Fused(torch.autograd.Function):
    """A kernel's context and logsumexp, both differentiable."""

    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        blind: Tensor | None, dropout: float, is_causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        context, lse, more = kernel.forward(query, key, value, mask, dropout, is_causal, scale)
        ctx.save_for_backward(query, key, value, mask, context, lse)
        ctx.kernel, ctx.more, ctx.options = kernel, more, (dropout, is_causal, scale)
        return context, _of_nothing(lse, blind)

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
            made: Grads = ctx.kernel.backward(
                grad, query, key, value, mask, context, lse, ctx.more, *ctx.options
            )
            return made

        q, k, v = with_lse_gradient(run, grad, grad_lse, query, key, value, context)
        if repeat:
            k, v = (torch.unflatten(g, -3, (-1, groups)).sum(-3) for g in (k, v))
        return None, q, k, v, None, None, None, None, None


def fused(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    dropout: float, is_causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Context and logsumexp."""
    mask, is_causal, blind = kernel_mask(mask, is_causal, query)
    options = (dropout, is_causal, scale)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        made: tuple[Tensor, Tensor] = Fused.apply(  # type: ignore[no-untyped-call]
            kernel, query, key, value, mask, blind, *options
        )
        return made
    context, lse, _ = kernel.forward(query, key, value, mask, *options)
    return context, _of_nothing(lse, blind)


def flash_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: Any
) -> tuple[Tensor, Tensor]:
    """The same by the CPU's kernel, without gradients, in as few steps as can be."""
    mask, is_causal, blind = kernel_mask(mask, is_causal, query)
    context, lse = kernels.flash_on_cpu(
        query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    return context, _of_nothing(lse, blind)


def _of_nothing(lse: Tensor, blind: Tensor | None) -> Tensor:
    """Some kernels call the logsumexp of no score at all 0."""
    return lse if blind is None else lse.masked_fill(blind, float("-inf"))


def usable(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, mask: Any, p: float) -> bool:
    """May this kernel take the place of SDPA's call of it, for these tensors?"""
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
