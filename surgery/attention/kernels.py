"""Kernels: the fused attention kernels behind SDPA, with the logsumexp that it keeps to itself.

Each is a pair of aten operators. With P = softmax(S), the gradient that reaches the scores is

    dS = P o (dO V^T - rowsum(dO o O) + dlse)

and a fused backward computes rowsum(dO o O) from the O that it is given, and uses O for nothing
else. So it is given another: O - dlse dO / |dO|^2, whose product with dO is less by dlse. Where dO
is near zero and dlse is not, or to look would cost a synchronisation, a column is appended instead:
-1 to O, dlse to dO, zeros to Q, K and V; cutting it off again leaves the same exact gradients.

That holds for a kernel that computes what it should from what it is given: kernel_trial.py tries.
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


# Not the operator of ``torch.ops``: to call that one takes a third longer for a single query.
flash_on_cpu = torch._scaled_dot_product_flash_attention_for_cpu


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
    made = flash_on_cpu(q, k, v, p, causal, attn_mask=mask, scale=scale)
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


ON_CPU = {SDPBackend.FLASH_ATTENTION.value: CPU}


CUDA = {
    SDPBackend.FLASH_ATTENTION.value: Kernel("flash", _flash, _flash_back, True, masks=False),
    SDPBackend.EFFICIENT_ATTENTION.value: Kernel("efficient", _efficient, _efficient_back),
    SDPBackend.CUDNN_ATTENTION.value: Kernel("cuDNN", _cudnn, _cudnn_back, grouped=True),
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
    """Gradients of query, key and value by a backward that knows only the context's."""
    if query.device.type == "cpu":
        wide = torch.promote_types(grad.dtype, torch.float32)
        norm = torch.linalg.vector_norm(grad, dim=-1, dtype=wide)  # (B, H, n)
        most = torch.finfo(context.dtype).max ** 0.5
        far = (norm < 1e-15) | (grad_lse.abs() > most * norm)
        if not bool((far & (grad_lse != 0)).any()):
            share = (grad_lse / norm.clamp(min=1e-15).square()).unsqueeze(-1)
            seen = torch.addcmul(context.to(wide), share, grad.to(wide), value=-1)
            whole = grad if grad.stride(-1) == 1 else grad.contiguous()
            return run(whole, query, key, value, seen.to(context.dtype))
    width = query.shape[-1]
    extra = 8 - width % 8  # one column would do; the kernels like widths that 8 divides
    query, key, value = (F.pad(x, (0, extra)) for x in (query, key, value))  # (B, H, ., d + e)
    context = F.pad(context, (0, extra), value=-1.0)
    column = grad_lse.to(grad.dtype).unsqueeze(-1)
    grad = F.pad(torch.cat([grad, column], -1), (0, extra - 1))
    q, k, v = run(grad, query, key, value, context)
    return q[..., :width], k[..., :width], v[..., :width]
