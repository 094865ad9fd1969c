"""Trial: does a fused kernel do what the equation says, on this device, in this dtype and width?

A kernel of a GPU is tried out on a small problem before it is used the first time for others of its
kind. One that fails is left to SDPA, and the logsumexp is computed from the scores.
"""

from __future__ import annotations

import functools
import math
import warnings
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from surgery.attention.kernels import Grads, Kernel, with_lse_gradient


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
    cuda = [trial.device] if trial.device.type == "cuda" else []
    with ExitStack() as stack:
        for mode in (_disable_current_modes(), torch.inference_mode(False), torch.enable_grad()):
            stack.enter_context(mode)
        stack.enter_context(torch.random.fork_rng(cuda))
        try:
            return _agrees(kernel, trial)
        except (RuntimeError, TypeError, ValueError) as error:  # a missing operator's is one, too
            if trial.groups == 1:
                warnings.warn(f"{kernel.name} cannot be used here: {error}", stacklevel=2)
            return False


@functools.cache
def grouped_backward(kernel: Kernel, device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Does its backward take fewer heads of keys than of queries?"""
    return kernel.grouped and trusted(kernel, Trial(device, dtype, width, groups=2))


def _agrees(kernel: Kernel, trial: Trial) -> bool:
    n, width = min(16, trial.width), trial.width
    groups, p = trial.groups, 0.5 if trial.dropping else 0.0
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
