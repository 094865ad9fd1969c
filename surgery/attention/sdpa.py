"""The attention core: one call that gives ``(context, lse)``, both with exact gradients.

    S = scale * Q K^T + M        context = softmax(S) V        lse = logsumexp(S, -1)

The prefix and inducer families need nothing else of an attention call (Chen et al. 2022,
arXiv:2210.14469, eqs 7-9). PyTorch's ``scaled_dot_product_attention`` (SDPA) keeps ``lse`` to
itself, so where SDPA would run a fused kernel we call that very kernel, which returns it, with
exact gradients for both (kernels.py, fused.py).

Where no fused kernel serves (float64 on CUDA, a mask that needs gradient, widths that differ) the
context comes from SDPA itself, so its bits and its random draws stay those of the base model, and
``lse`` from the scores, densely.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend

from surgery.attention.fused import flash_on_cpu, fused, usable
from surgery.attention.kernels import CPU, CUDA, ON_CPU, Kernel
from surgery.attention.math_path import math_path, math_path_agrees


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention that also returns its logsumexp.

    The arguments are those of ``torch.nn.functional.scaled_dot_product_attention``, and so are
    the bits of the context.

    Shape:
        query (B, H, n, d), key (B, G, m, d), value (B, G, m, d), G = H unless ``enable_gqa``
        -> context (B, H, n, d) in the dtype of query, lse (B, H, n) in at least float32
    Cost: a fused kernel call; densely, one more product of queries and keys.
    """
    if _at_once(query, key, value, attn_mask, dropout_p):
        choice = torch._fused_sdp_choice(
            query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        if choice == SDPBackend.FLASH_ATTENTION.value:
            return flash_on_cpu(query, key, value, attn_mask, is_causal, scale)
    if _autocast(query):
        query, key, value, attn_mask = _cast(query, key, value, attn_mask)
    own = query.dtype == key.dtype == value.dtype and (query.is_cpu or query.is_cuda)
    kernel = None
    if own:
        kernel = _kernel(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if kernel is not None:
        options = (dropout_p, is_causal, _scale(query, scale))
        return fused(kernel, query, key, value, attn_mask, *options)
    if own and _plain_on_cpu(query, key, value, attn_mask, dropout_p, is_causal):
        return math_path(query, key, value, attn_mask, dropout_p, is_causal, _scale(query, scale))
    context = F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return context, dense_lse(query, key, attn_mask, is_causal, scale)


def _at_once(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float) -> bool:
    """Is this a plain call without gradients on a CPU, for which nothing else need be asked?"""
    if p or torch.is_grad_enabled() or type(query) is not Tensor:
        return False
    if mask is not None and (type(mask) is not Tensor or mask.requires_grad):
        return False
    alike = query.dtype == key.dtype == value.dtype
    return alike and query.is_cpu and not torch.is_autocast_enabled("cpu")


def dense_lse(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """``logsumexp(scale * Q K^T + M, -1)`` from the scores themselves, in at least float32.

    Shape: query (B, H, n, d), key (B, G, m, d) with G dividing H -> (B, H, n)
    Cost: memory and time O(n m) per head.
    """
    if _autocast(query):  # it would take the products in its own dtype
        with torch.autocast(query.device.type, enabled=False):
            return _dense_lse(query, key, attn_mask, is_causal, scale)
    return _dense_lse(query, key, attn_mask, is_causal, scale)


def _dense_lse(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[-3] // key.shape[-3]
    queries = torch.unflatten(query.to(wide), -3, (key.shape[-3], groups))  # (B, G, H/G, n, d)
    scores = queries @ key.to(wide).unsqueeze(-3).mT * _scale(query, scale)  # (B, G, H/G, n, m)
    scores = scores.flatten(-4, -3)  # (B, H, n, m)
    if is_causal:  # aligned to the upper left corner, as SDPA does it
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(allowed.logical_not(), float("-inf"))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(attn_mask.logical_not(), float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return logsumexp(scores)


def logsumexp(scores: Tensor) -> Tensor:
    """Logsumexp over the last axis in at least float32; -inf, without NaN gradients, if all are.

    Shape: (..., n, m) -> (..., n)
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    lse = scores.masked_fill(empty, 0.0).logsumexp(-1)
    return lse.masked_fill(empty.squeeze(-1), float("-inf"))


def _scale(query: Tensor, scale: float | None) -> float:
    # Not ``** -0.5``: in float64 its last bit differs from the one that SDPA uses.
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale


def _autocast(x: Tensor) -> bool:
    if x.is_cpu:  # not every device has one, and to ask takes as long as a small operation
        return torch.is_autocast_enabled("cpu")
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _cast(*given: Tensor | None) -> tuple[Any, ...]:
    """What SDPA makes of its arguments under autocast: the lower dtype, but of float64."""

    def cast(x: Tensor | None) -> Tensor | None:
        if x is None or not x.is_floating_point() or x.dtype == torch.float64:
            return x
        return x.to(torch.get_autocast_dtype(x.device.type))

    return tuple(map(cast, given))


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Kernel | None:
    """The fused kernel that SDPA would run for this call, if it gives us its logsumexp."""
    if isinstance(query, FakeTensor):
        plain = key.shape[-3] == query.shape[-3] and query.device.type == "cpu"
        fits = plain and _compiles_to_flash(query, key, value, attn_mask, dropout_p)
        return CPU if fits else None
    choice = torch._fused_sdp_choice(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    known = CUDA if query.is_cuda else ON_CPU
    kernel = known.get(choice)
    fits = kernel is not None and usable(kernel, query, key, value, attn_mask, dropout_p)
    return kernel if fits else None


def _plain_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool
) -> bool:
    """Would SDPA go its plain way here, which we know to go too?"""
    if query.device.type != "cpu" or isinstance(query, FakeTensor):
        return False
    wide = query.dtype in (torch.float32, torch.float64)
    alike = query.shape[:-2] == key.shape[:-2] == value.shape[:-2] and query.dim() == 4
    if not (wide and alike) or (causal and mask is not None):
        return False
    choice = torch._fused_sdp_choice(query, key, value, mask, dropout, causal)
    if choice != SDPBackend.MATH.value:
        return False
    return math_path_agrees(query.dtype, dropout > 0, mask is not None, causal)


def _compiles_to_flash(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float
) -> bool:
    """The same question while torch.compile looks on: SDPA itself gives no answer then."""
    plain = query.dim() == key.dim() == value.dim() == 4
    same = query.shape[-1] == key.shape[-1] == value.shape[-1] and query.dtype == key.dtype
    some = query.shape[-2] > 0 and key.shape[-2] > 0
    needs = attn_mask is not None and attn_mask.requires_grad
    enabled = torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]  # any device
    return enabled and plain and same and some and not needs and dropout_p == 0.0
