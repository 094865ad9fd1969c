"""Compute attention and the logsumexp of its scores in one call, both with exact gradients.

    S = scale * Q K^T + M        context = softmax(S) V        lse = logsumexp(S, -1)

The prefix and inducer families need nothing else of an attention call (Chen et al. 2022,
arXiv:2210.14469, eqs 7-9). PyTorch's ``scaled_dot_product_attention`` (SDPA) computes ``lse`` in
its fused kernels but does not return it. :func:`attention` takes SDPA's arguments and returns both.
It asks SDPA which kernel it would choose, then takes the first of three ways that serves the call:

    attention(query, key, value, attn_mask, ...)
        |   SDPA would choose
        +-- a fused kernel ----> fused.py         calls the same kernel, which returns lse
        |                          masks.py         converts the mask, once for all layers
        |                          kernels.py       has the aten operators and the gradient of lse
        |                          kernel_trial.py  tries a GPU kernel before its first use
        +-- no kernel, on CPU -> math_path.py     repeats SDPA's operations; lse from the scores
        +-- anything else -----> SDPA for the context, dense_lse() for lse

On each way the context has the bits of SDPA's result, and dropout draws the base model's random
numbers. The ways differ in cost: the third multiplies queries and keys twice. On CUDA the third
serves float64, a mask that needs a gradient, and heads of different widths; everywhere it serves
calls under ``torch.func``, ``torch.export`` and ``torch.jit.trace``, which know no fused kernel.

A call keeps converted masks for as long as the mask lives, and outcomes of trials for as long as
the process does. Nothing else outlives it.

Two files build on this call: library_functions.py makes a library's attention function return
``lse`` too, and virtual_keys.py adds keys and values to an attention that is already computed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend

from surgery.attention.fused import flash_inference_on_cpu, fused_attention, usable
from surgery.attention.kernels import CPU, CUDA, ON_CPU, Kernel
from surgery.attention.math_path import math_path, math_path_agrees
from surgery.attention.transforms import transformed


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
    """Compute scaled dot-product attention and the logsumexp of its scores.

    The arguments are those of ``torch.nn.functional.scaled_dot_product_attention``. The context
    has the same bits as that function's result.

    Shape:
        query (B, H, n, d), key (B, G, m, d), value (B, G, m, d), G = H unless ``enable_gqa``
        -> context (B, H, n, d) in the dtype of query, lse (B, H, n) in at least float32
    Cost: that of SDPA, if a fused kernel or the math path serves the call; else one more product
        of queries and keys, and O(n m) memory per head.
    """
    if transformed():  # such calls reach plain operations alone
        context = F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
            enable_gqa=bool(enable_gqa),
        )  # fmt: skip
        return context, dense_lse(query, key, attn_mask, is_causal, scale)
    if _plain_inference_on_cpu(query, key, value, attn_mask, dropout_p):
        choice = torch._fused_sdp_choice(
            query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        if choice == SDPBackend.FLASH_ATTENTION.value:
            return flash_inference_on_cpu(query, key, value, attn_mask, is_causal, scale)
    if _autocast_enabled(query):
        query, key, value, attn_mask = _cast_as_autocast(query, key, value, attn_mask)
    supported = query.dtype == key.dtype == value.dtype and (query.is_cpu or query.is_cuda)
    kernel = None
    if supported:
        kernel = _fused_kernel(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
    if kernel is not None:
        options = (dropout_p, is_causal, _scale(query, scale))
        return fused_attention(kernel, query, key, value, attn_mask, *options)
    if supported and _takes_math_path(query, key, value, attn_mask, dropout_p, is_causal):
        return math_path(query, key, value, attn_mask, dropout_p, is_causal, _scale(query, scale))
    context = F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return context, dense_lse(query, key, attn_mask, is_causal, scale)


def _plain_inference_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float
) -> bool:
    """Whether plain tensors on a CPU are called without gradients, dropout and autocast.

    Decoding makes one such call per layer and token. It skips the slower checks of
    :func:`attention`.
    """
    if p or torch.is_grad_enabled() or type(query) is not Tensor:
        return False
    if mask is not None and (type(mask) is not Tensor or mask.requires_grad):
        return False
    same_shape = query.dtype == key.dtype == value.dtype
    return same_shape and query.is_cpu and not torch.is_autocast_enabled("cpu")


def dense_lse(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Compute ``logsumexp(scale * Q K^T + M, -1)`` from all the scores, in at least float32.

    Shape: query (B, H, n, d), key (B, G, m, d) with G dividing H -> (B, H, n)
    Cost: memory and time O(n m) per head.
    """
    if _autocast_enabled(query):  # autocast would compute the product in its lower dtype
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
    if is_causal:  # aligned to the upper left corner, as in SDPA
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(allowed.logical_not(), float("-inf"))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(attn_mask.logical_not(), float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return logsumexp(scores)


def logsumexp(scores: Tensor) -> Tensor:
    """Compute the logsumexp over the last axis, in at least float32.

    A row in which every score is -inf gives -inf. Its gradient is 0, where that of
    ``torch.logsumexp`` is NaN.

    Shape: (..., n, m) -> (..., n)
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    lse = scores.masked_fill(empty, 0.0).logsumexp(-1)
    return lse.masked_fill(empty.squeeze(-1), float("-inf"))


def _scale(query: Tensor, scale: float | None) -> float:
    # Not ``** -0.5``: in float64 its last bit differs from that of SDPA's default.
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale


def _autocast_enabled(x: Tensor) -> bool:
    if x.is_cpu:  # has autocast for certain; asking whether a device has it costs a small operator
        return torch.is_autocast_enabled("cpu")
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _cast_as_autocast(*given: Tensor | None) -> tuple[Any, ...]:
    """Cast SDPA's arguments as autocast does: floating-point ones to its dtype, except float64."""

    def cast(x: Tensor | None) -> Tensor | None:
        if x is None or not x.is_floating_point() or x.dtype == torch.float64:
            return x
        return x.to(torch.get_autocast_dtype(x.device.type))

    return tuple(map(cast, given))


def _fused_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Kernel | None:
    """Return the fused kernel that SDPA would run for this call, or None if we cannot use one."""
    if isinstance(query, FakeTensor):
        plain = key.shape[-3] == query.shape[-3] and query.device.type == "cpu"
        fits = plain and _compiles_to_flash(query, key, value, attn_mask, dropout_p)
        return CPU if fits else None
    choice = torch._fused_sdp_choice(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    kernels = CUDA if query.is_cuda else ON_CPU
    kernel = kernels.get(choice)
    fits = kernel is not None and usable(kernel, query, key, value, attn_mask, dropout_p)
    return kernel if fits else None


def _takes_math_path(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool
) -> bool:
    """Whether SDPA would take its math path here, and :func:`math_path` gives the same bits."""
    if query.device.type != "cpu" or isinstance(query, FakeTensor):
        return False
    wide = query.dtype in (torch.float32, torch.float64)
    same_shape = query.shape[:-2] == key.shape[:-2] == value.shape[:-2] and query.dim() == 4
    if not (wide and same_shape) or (causal and mask is not None):
        return False
    choice = torch._fused_sdp_choice(query, key, value, mask, dropout, causal)
    if choice != SDPBackend.MATH.value:
        return False
    return math_path_agrees(query.dtype, dropout > 0, mask is not None, causal)


def _compiles_to_flash(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float
) -> bool:
    """Whether SDPA would run flash attention on a CPU, decided from the shapes alone.

    Under torch.compile the tensors are fake, and ``_fused_sdp_choice`` gives no answer for them.
    """
    plain = query.dim() == key.dim() == value.dim() == 4
    same = query.shape[-1] == key.shape[-1] == value.shape[-1] and query.dtype == key.dtype
    nonempty = query.shape[-2] > 0 and key.shape[-2] > 0
    mask_needs_grad = attn_mask is not None and attn_mask.requires_grad
    enabled = torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]  # any device
    return enabled and plain and same and nonempty and not mask_needs_grad and dropout_p == 0.0
