"""Call the fused attention kernels behind SDPA, and give their logsumexp a gradient.

Each kernel is a pair of aten operators, forward and backward. The forward returns the logsumexp
lse of the scores S; the backward knows no gradient for it. With P = softmax(S), the context O and
the gradients dO and dlse, the gradient of the scores is

    dS = P o (dO V^T - rowsum(dO o O) + dlse)

A fused backward computes rowsum(dO o O) from the O that it is given, and uses O for nothing else.
So another O makes the same kernel compute the term with dlse. There are two such O:

1. O - dlse dO / |dO|^2. Its product with dO is rowsum(dO o O) - dlse. It fails where dO is near
   zero and dlse is not, and testing for that would make the CPU wait for a GPU.
2. O with one more column: -1 in O, dlse in dO, and zeros in Q, K and V. The gradients without
   their last column are the exact ones. It always works; the kernel runs on a greater width.

:func:`with_lse_gradient` takes the first on a CPU where it holds, else the second. Either fails if
a backward uses O in another way, which kernel_trial.py tests on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

_aten = torch.ops.aten


# Not the operator of ``torch.ops``: calling that takes a third longer for a single query.
flash_on_cpu = torch._scaled_dot_product_flash_attention_for_cpu


Grads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Kernel:
    """A fused forward and its backward.

    Attributes:
        name: for warnings.
        forward: (query, key, value, mask, dropout, is_causal, scale) -> (context, lse, state);
            ``state`` is what else the backward needs, such as the seed of dropout.
        backward: (grad, query, key, value, mask, context, lse, state, dropout, is_causal, scale)
            -> gradients of query, key and value
        grouped: whether it takes fewer key heads than query heads (G < H).
        masks: whether it takes an additive mask.
        multiple: the number that must divide the width of a head.
    """

    name: str
    forward: Callable[..., tuple[Tensor, Tensor, Any]]
    backward: Callable[..., Grads]
    grouped: bool = False
    masks: bool = True
    multiple: int = 8


def _cpu(q: Tensor, k: Tensor, v: Tensor, mask: Any, p: float, causal: bool, scale: float) -> Any:
    outputs = flash_on_cpu(q, k, v, p, causal, attn_mask=mask, scale=scale)
    return *outputs, None


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, o: Tensor, lse: Tensor, state: Any,
    p: float, causal: bool, scale: float,
) -> Grads:  # fmt: skip
    grads: Grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, o, lse, p, causal, attn_mask=mask, scale=scale
    )
    return grads


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Any, p: float, causal: bool, scale: float) -> Any:
    o, lse, *state = _aten._scaled_dot_product_flash_attention(q, k, v, p, causal, scale=scale)
    return o, lse, state


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, o: Tensor, lse: Tensor, state: Any,
    p: float, causal: bool, scale: float,
) -> Grads:  # fmt: skip
    cum_q, cum_k, max_q, max_k, seed, offset, *_ = state
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
    return o, lse[..., : q.shape[-2]], (lse, seed, offset)  # the kernel pads the rows of lse


def _efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, o: Tensor, lse: Tensor, state: Any,
    p: float, causal: bool, scale: float,
) -> Grads:  # fmt: skip
    padded, seed, offset = state
    wanted = [True, True, True, False]
    grads = _aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, _aligned(mask, q, k), o, padded, seed, offset, p, wanted, causal, scale=scale
    )
    return grads[0], grads[1], grads[2]


def _cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Any, p: float, causal: bool, scale: float) -> Any:
    o, lse, *state = _aten._scaled_dot_product_cudnn_attention(
        q, k, v, mask, True, p, causal, False, scale=scale
    )
    return o, lse.reshape(q.shape[:-1]), (lse, *state)


def _cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, o: Tensor, lse: Tensor, state: Any,
    p: float, causal: bool, scale: float,
) -> Grads:  # fmt: skip
    raw_lse, cum_q, cum_k, max_q, max_k, seed, offset, *_ = state
    grads: Grads = _aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, o, raw_lse, seed, offset, mask, cum_q, cum_k, max_q, max_k, p, causal,
        scale=scale,
    )  # fmt: skip
    return grads


def _aligned(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Expand a mask to every head, and align its rows to 16 elements, as the kernel requires."""
    if mask is None:
        return None
    n, m = q.shape[-2], k.shape[-2]
    if m % 16:
        mask = F.pad(mask.expand(*mask.shape[:-1], m), (0, 16 - m % 16))[..., :m]
    return mask.expand(*q.shape[:-2], n, m)


CPU = Kernel("flash on the CPU", _cpu, _cpu_backward, grouped=True)


ON_CPU = {SDPBackend.FLASH_ATTENTION.value: CPU}


CUDA = {
    SDPBackend.FLASH_ATTENTION.value: Kernel("flash", _flash, _flash_backward, True, masks=False),
    SDPBackend.EFFICIENT_ATTENTION.value: Kernel("efficient", _efficient, _efficient_backward),
    SDPBackend.CUDNN_ATTENTION.value: Kernel("cuDNN", _cudnn, _cudnn_backward, grouped=True),
}


def with_lse_gradient(
    run: Callable[..., Grads],
    grad: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: Tensor,
) -> Grads:
    """Return the gradients of query, key and value for gradients of both context and lse.

    Args:
        run: (grad, query, key, value, context) -> gradients; a backward for the context alone.
        grad: gradient of the context (B, H, n, d).
        grad_lse: gradient of lse (B, H, n).

    The two ways are numbered in the docstring of this module.
    """
    if query.device.type == "cpu":  # way 1
        wide = torch.promote_types(grad.dtype, torch.float32)
        norm = torch.linalg.vector_norm(grad, dim=-1, dtype=wide)  # (B, H, n)
        largest = torch.finfo(context.dtype).max ** 0.5
        unsafe = (norm < 1e-15) | (grad_lse.abs() > largest * norm)
        if not bool((unsafe & (grad_lse != 0)).any()):
            shift = (grad_lse / norm.clamp(min=1e-15).square()).unsqueeze(-1)
            shifted = torch.addcmul(context.to(wide), shift, grad.to(wide), value=-1)
            rows = grad if grad.stride(-1) == 1 else grad.contiguous()
            return run(rows, query, key, value, shifted.to(context.dtype))
    width = query.shape[-1]  # way 2
    extra = 8 - width % 8  # one column is needed; CUDA kernels take widths that 8 divides
    query, key, value = (F.pad(x, (0, extra)) for x in (query, key, value))  # (B, H, ., d + e)
    context = F.pad(context, (0, extra), value=-1.0)
    column = grad_lse.to(grad.dtype).unsqueeze(-1)
    grad = F.pad(torch.cat([grad, column], -1), (0, extra - 1))
    q, k, v = run(grad, query, key, value, context)
    return q[..., :width], k[..., :width], v[..., :width]
