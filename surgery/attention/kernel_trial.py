"""Try a fused kernel on a small problem before its first use on a device, in a dtype and width.

The trial compares context, logsumexp and gradients with the equation in float64. Its outcome holds
for the process. After a failure SDPA computes the context and the scores give the logsumexp, so a
kernel that is missing, or broken on some device, costs time and never correctness.

The gradient of the logsumexp relies on how a kernel's backward uses its arguments (kernels.py),
which torch does not promise. That is why a trial is needed.
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
    """A small problem that a kernel must solve before it is used for others of its kind.

    Attributes:
        width: the width d of a head.
        groups: H / G, how many query heads share a key head.
        masked: with an additive mask; else with the causal flag.
        dropping: with dropout.
    """

    device: torch.device
    dtype: torch.dtype
    width: int
    groups: int = 1
    masked: bool = False
    dropping: bool = False


@functools.cache
def trusted(kernel: Kernel, trial: Trial) -> bool:
    """Whether a kernel gives the context, the logsumexp and the gradients of the equation.

    Each trial runs once per process. The random state is restored.
    """
    cuda = [trial.device] if trial.device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch._C.DisableTorchFunction())  # by which torch.export records
        for mode in (torch.inference_mode(False), torch.enable_grad()):
            stack.enter_context(mode)
        stack.enter_context(torch.random.fork_rng(cuda))
        try:
            return _agrees(kernel, trial)
        except (RuntimeError, TypeError, ValueError) as error:  # also of a missing operator
            if trial.groups == 1:
                warnings.warn(
                    f"{kernel.name} cannot be used here: {error}. The context comes from SDPA "
                    "instead and lse from all the scores, which takes O(n m) memory per head.",
                    stacklevel=2,
                )
            return False


@functools.cache
def grouped_backward(kernel: Kernel, device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether a kernel's backward takes fewer key heads than query heads (G < H).

    A kernel may take them in the forward only; then keys and values are repeated for its backward.
    """
    return kernel.grouped and trusted(kernel, Trial(device, dtype, width, groups=2))


def _agrees(kernel: Kernel, trial: Trial) -> bool:
    """Whether a kernel's results for one small causal problem are those of float64.

    With dropout, one-hot values make the context show which weights the kernel has kept; the
    reference keeps the same ones.
    """
    n, width = min(16, trial.width), trial.width
    groups, p = trial.groups, 0.5 if trial.dropping else 0.0
    wave = torch.arange(2 * 2 * groups * n * width, device=trial.device, dtype=torch.float32)
    q = (wave * 0.7).sin().reshape(2, 2 * groups, n, width).to(trial.dtype)
    k, v = ((wave * a).cos().reshape(2, 2 * groups, n, width)[:, :2] for a in (1.3, 0.3))
    k, v = k.to(trial.dtype), v.to(trial.dtype)
    if trial.dropping:  # one-hot values: the context is the matrix of weights
        v = torch.eye(n, width, device=trial.device, dtype=trial.dtype).expand_as(k).contiguous()
    hidden = torch.ones(n, n, dtype=torch.bool, device=trial.device).triu(1)
    mask = torch.zeros(2, 1, n, n, device=trial.device, dtype=trial.dtype) if trial.masked else None
    if mask is not None:
        mask.masked_fill_(hidden, float("-inf"))
    grad, options = q.flip(-1).contiguous(), (p, mask is None, 1 / math.sqrt(width))
    o, lse, state = kernel.forward(q, k, v, mask, *options)

    def run(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> Grads:
        return kernel.backward(grad, q, k, v, mask, o, lse, state, *options)

    results = [o, lse, *with_lse_gradient(run, grad, torch.ones_like(lse), q, k, v, o)]
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(groups, 1) for x in wide[1:])
    scores = (wide[0] @ keys.mT * options[-1]).masked_fill(hidden, float("-inf"))
    weights, total = scores.softmax(-1), scores.logsumexp(-1)
    if trial.dropping:
        survived = o[..., :n].double() > weights.detach()
        weights = weights * survived / (1 - p)
    context = weights @ values
    loss = (context * grad.double()).sum() + total.sum()
    expected = [context, total, *torch.autograd.grad(loss, wide)]
    bound = {torch.float32: 2e-3}.get(trial.dtype, 5e-2)  # allows TF32 and bfloat16
    pairs = zip(results, expected, strict=True)
    return all(
        a.shape == b.shape and bool(((a.double() - b).abs() <= bound * (1 + b.abs())).all())
        for a, b in pairs
    )
