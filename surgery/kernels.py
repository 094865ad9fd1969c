"""Kernels: the fused attention kernels behind SDPA, with the logsumexp that it keeps to itself.

Each is a pair of aten operators. With P = softmax(S), the gradient that reaches the scores is

    dS = P o (dO V^T - rowsum(dO o O) + dlse)

and a fused backward computes rowsum(dO o O) from the O that it is given, and uses O for nothing
else. So it is given another: O - dlse dO / |dO|^2, whose product with dO is less by dlse. Where dO
is near zero and dlse is not, or to look would cost a synchronisation, a column is appended instead:
-1 to O, dlse to dO, zeros to Q, K and V; cutting it off again leaves the same exact gradients.

That holds for a kernel that computes what it should from what it is given. Whether one of a GPU
does, on this device, in this dtype and at this width, is tried out against the equation before it
is used the first time; one that does not is left to SDPA, and the logsumexp is computed from the
scores.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import _disable_current_modes

_aten = torch.ops.aten
_flash_on_cpu = _aten._scaled_dot_product_flash_attention_for_cpu.default
Grads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Kernel:
    """A fused forward and backward.

    Attributes:
        forward: (query, key, value, mask, dropout, is_causal, scale) -> (context, lse, more)
        backward: (grad, query, key, value, mask, context, lse, more, dropout, is_causal, scale)
            -> gradients of query, key and value
        grouped: does it take fewer heads of keys than of queries?
        masks: does it take an additive mask?
        multiple: what the width of a head must be a multiple of.
    """

    name: str
    forward: Callable[..., tuple[Tensor, Tensor, Any]]
    backward: Callable[..., Grads]
    grouped: bool = False
    masks: bool = True
    multiple: int = 8


def _cpu(q: Tensor, k: Tensor, v: Tensor, mask: Any, p: float, causal: bool, scale: float) -> Any:
    made = _flash_on_cpu(q, k, v, p, causal, attn_mask=mask, scale=scale)
    return *made, None


def _cpu_back(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, o: Tensor, lse: Tensor, more: Any,
    p: float, causal: bool, scale: float,
) -> Grads:  # fmt: skip
    grads: Grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, o, lse, p, causal, attn_mask=mask, scale=scale
    )
    return grads


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Any, p: float, causal: bool, scale: float) -> Any:
    o, lse, *more = _aten._scaled_dot_product_flash_attention(q, k, v, p, causal, scale=scale)
    return o, lse, more


def _flash_back(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, o: Tensor, lse: Tensor, more: Any,
    p: float, causal: bool, scale: float,
) -> Grads:  # fmt: skip
    cum_q, cum_k, max_q, max_k, seed, offset, *_ = more
    grads: Grads = _aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, o, lse, cum_q, cum_k, max_q, max_k, p, causal, seed, offset, scale=scale
    )
    return grads


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, p: float, causal: bool, scale: float
) -> Any:
    bias = _aligned(mask, q, k)
    o, lse, seed, offset = _aten._scaled_dot_product_efficient_attention(
        q, k, v, bias, True, p, causal, scale=scale
    )
    return o, lse[..., : q.shape[-2]], (lse, seed, offset)  # its rows are padded to a multiple


def _efficient_back(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, o: Tensor, lse: Tensor, more: Any,
    p: float, causal: bool, scale: float,
) -> Grads:  # fmt: skip
    whole, seed, offset = more
    wanted = [True, True, True, False]
    grads = _aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, _aligned(mask, q, k), o, whole, seed, offset, p, wanted, causal, scale=scale
    )
    return grads[0], grads[1], grads[2]


def _cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Any, p: float, causal: bool, scale: float) -> Any:
    o, lse, *more = _aten._scaled_dot_product_cudnn_attention(
        q, k, v, mask, True, p, causal, False, scale=scale
    )
    return o, lse.reshape(q.shape[:-1]), (lse, *more)


def _cudnn_back(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, o: Tensor, lse: Tensor, more: Any,
    p: float, causal: bool, scale: float,
) -> Grads:  # fmt: skip
    whole, cum_q, cum_k, max_q, max_k, seed, offset, *_ = more
    grads: Grads = _aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, o, whole, seed, offset, mask, cum_q, cum_k, max_q, max_k, p, causal,
        scale=scale,
    )  # fmt: skip
    return grads


def _aligned(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """A mask for every head, with rows that begin at multiples of 16, as the kernel wants them."""
    if mask is None:
        return None
    n, m = q.shape[-2], k.shape[-2]
    if m % 16:
        mask = F.pad(mask.expand(*mask.shape[:-1], m), (0, 16 - m % 16))[..., :m]
    return mask.expand(*q.shape[:-2], n, m)


CPU = Kernel("flash on the CPU", _cpu, _cpu_back, grouped=True)
CUDA = {
    SDPBackend.FLASH_ATTENTION.value: Kernel("flash", _flash, _flash_back, True, masks=False),
    SDPBackend.EFFICIENT_ATTENTION.value: Kernel("efficient", _efficient, _efficient_back),
    SDPBackend.CUDNN_ATTENTION.value: Kernel("cuDNN", _cudnn, _cudnn_back, grouped=True),
}


class Fused(torch.autograd.Function):
    """A kernel's context and logsumexp, both differentiable."""

    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        dropout: float, is_causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        context, lse, more = kernel.forward(query, key, value, mask, dropout, is_causal, scale)
        ctx.save_for_backward(query, key, value, mask, context, lse)
        ctx.kernel, ctx.more, ctx.options = kernel, more, (dropout, is_causal, scale)
        return context, _of_nothing(lse, mask)

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
        return None, q, k, v, None, None, None, None


def with_lse_gradient(
    run: Callable[..., Grads],
    grad: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: Tensor,
) -> Grads:
    """Gradients of query, key and value by a backward that knows only the context's."""
    if query.device.type == "cpu":
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        size = wide.square().sum(-1)  # (B, H, n)
        most = torch.finfo(context.dtype).max ** 0.5
        far = (size < 1e-30) | (grad_lse.abs() > most * size.sqrt())
        if not bool((far & (grad_lse != 0)).any()):
            share = (grad_lse / size.clamp(min=1e-30)).unsqueeze(-1)
            seen = (context - share * wide).to(context.dtype)
            return run(grad.contiguous(), query, key, value, seen)
    width = query.shape[-1]
    extra = 8 - width % 8  # one column would do; the kernels like widths that 8 divides
    query, key, value = (F.pad(x, (0, extra)) for x in (query, key, value))  # (B, H, ., d + e)
    context = F.pad(context, (0, extra), value=-1.0)
    column = grad_lse.to(grad.dtype).unsqueeze(-1)
    grad = F.pad(torch.cat([grad, column], -1), (0, extra - 1))
    q, k, v = run(grad, query, key, value, context)
    return q[..., :width], k[..., :width], v[..., :width]


def fused(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    """Context and logsumexp; ``options`` are dropout, is_causal and scale."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        made: tuple[Tensor, Tensor] = Fused.apply(kernel, query, key, value, mask, *options)  # type: ignore[no-untyped-call]
        return made
    context, lse, _ = kernel.forward(query, key, value, mask, *options)
    return context, _of_nothing(lse, mask)


def _of_nothing(lse: Tensor, mask: Tensor | None) -> Tensor:
    """Some kernels call the logsumexp of no score at all 0."""
    if mask is None:
        return lse
    return lse.masked_fill((mask == float("-inf")).all(-1), float("-inf"))


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


@dataclass(frozen=True)
class Trial:
    """A small problem that a kernel must solve before it is used for others of its kind."""

    device: torch.device
    dtype: torch.dtype
    width: int
    groups: int = 1
    masked: bool = False
    dropping: bool = False


@functools.cache
def trusted(kernel: Kernel, trial: Trial) -> bool:
    """Does a kernel give the context, the logsumexp and the gradients of the equation?

    It is tried out once for each kind of problem; no random state moves.
    """
    modes = _disable_current_modes(), torch.inference_mode(False), torch.enable_grad()
    cuda = [trial.device] if trial.device.type == "cuda" else []
    with modes[0], modes[1], modes[2], torch.random.fork_rng(cuda):
        try:
            return _agrees(kernel, trial)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            if trial.groups == 1:
                warnings.warn(f"{kernel.name} cannot be used here: {error}", stacklevel=2)
            return False


@functools.cache
def grouped_backward(kernel: Kernel, device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Does its backward take fewer heads of keys than of queries?"""
    return kernel.grouped and trusted(kernel, Trial(device, dtype, width, groups=2))


def _agrees(kernel: Kernel, trial: Trial) -> bool:
    n, width, groups, p = 8, trial.width, trial.groups, 0.5 if trial.dropping else 0.0
    wave = torch.arange(2 * 2 * groups * n * width, device=trial.device, dtype=torch.float32)
    q = (wave * 0.7).sin().reshape(2, 2 * groups, n, width).to(trial.dtype)
    k, v = ((wave * a).cos().reshape(2, 2 * groups, n, width)[:, :2] for a in (1.3, 0.3))
    k, v = k.to(trial.dtype), v.to(trial.dtype)
    if trial.dropping:  # the context shows which weights were dropped
        v = torch.eye(n, width, device=trial.device, dtype=trial.dtype).expand_as(k).contiguous()
    hidden = torch.ones(n, n, dtype=torch.bool, device=trial.device).triu(1)
    mask = torch.zeros(2, 1, n, n, device=trial.device, dtype=trial.dtype) if trial.masked else None
    if mask is not None:
        mask.masked_fill_(hidden, float("-inf"))
    grad, options = q.flip(-1).contiguous(), (p, mask is None, 1 / math.sqrt(width))
    o, lse, more = kernel.forward(q, k, v, mask, *options)

    def run(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> Grads:
        return kernel.backward(grad, q, k, v, mask, o, lse, more, *options)

    given = [o, lse, *with_lse_gradient(run, grad, torch.ones_like(lse), q, k, v, o)]
    own = [x.detach().double().requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(groups, 1) for x in own[1:])
    scores = (own[0] @ keys.mT * options[-1]).masked_fill(hidden, float("-inf"))
    weights, total = scores.softmax(-1), scores.logsumexp(-1)
    if trial.dropping:
        kept = o[..., :n].double() > weights.detach()
        weights = weights * kept / (1 - p)
    context = weights @ values
    loss = (context * grad.double()).sum() + total.sum()
    expected = [context, total, *torch.autograd.grad(loss, own)]
    bound = {torch.float32: 2e-3}.get(trial.dtype, 5e-2)  # TF32, bfloat16: no reason to refuse
    pairs = zip(given, expected, strict=True)
    return all(
        a.shape == b.shape and bool(((a.double() - b).abs() <= bound * (1 + b.abs())).all())
        for a, b in pairs
    )
