"""Check the attention core on each kernel of SDPA: context, logsumexp and gradients in float64."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.record import Cells, Record
from surgery.attention.fused import usable
from surgery.attention.kernels import CUDA, ON_CPU
from surgery.attention.sdpa import attention

TITLE = "The attention core on each kernel: largest relative error against float64"
BOUNDS = {torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.float32: 2e-3, torch.float64: 1e-9}
WIDTHS = (64, 128)
KERNELS = {
    "SDPA's choice": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}


@dataclass(frozen=True)
class Case:
    """One kind of call.

    Attributes:
        groups: H / G, how many query heads share a key head.
        padded: with an additive mask, causal and with padding on the left; else the causal flag.
        dropout: the probability.
        last: the query is the last row alone, as in decoding; no mask.
    """

    groups: int = 1
    padded: bool = False
    dropout: float = 0.0
    last: bool = False


CASES = {
    "causal": Case(),
    "padded": Case(padded=True),
    "grouped": Case(groups=4),
    "grouped, padded": Case(groups=4, padded=True),
    "dropout": Case(dropout=0.5),
    "dropout, padded": Case(dropout=0.5, padded=True),
    "one query": Case(groups=4, last=True),
}


@contextmanager
def only(backend: SDPBackend | None) -> Iterator[None]:
    if backend is None:
        yield
    else:
        with sdpa_kernel(backend):
            yield


def visible(case: Case, n: int, device: str) -> Tensor:
    """Return which keys each query sees (2, 1, n, n); every query sees one at least."""
    seen = torch.ones(n, n, dtype=torch.bool, device=device).tril().repeat(2, 1, 1, 1)
    if case.padded:
        seen[0, ..., : n // 4] = False
        seen[0, 0] |= torch.eye(n, dtype=torch.bool, device=device)
    return seen[..., -1:, :] if case.last else seen


def errors(case: Case, dtype: torch.dtype, width: int, backend: SDPBackend | None) -> Cells:
    """Return the largest relative error, and whether a fused kernel gave lse.

    With dropout the first call has one-hot values: its context shows which weights were kept, and
    the second call, from the same seed, keeps the same ones.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n = 64
    torch.manual_seed(3)
    q = torch.randn(2, 8, 1 if case.last else n, width, device=device).to(dtype).requires_grad_()
    k, v = (torch.randn(2, 8 // case.groups, n, width, device=device).to(dtype) for _ in range(2))
    k.requires_grad_(), v.requires_grad_()
    seen, mask = visible(case, n, device), None
    if case.padded:
        mask = torch.zeros(seen.shape, device=device, dtype=dtype).masked_fill(~seen, -torch.inf)
    causal = mask is None and not case.last
    options = (mask, case.dropout, causal, None, case.groups > 1)
    with only(backend):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # SDPA's reasons why it cannot
                plain = F.scaled_dot_product_attention(
                    q, k, v, mask, case.dropout, causal, enable_gqa=case.groups > 1
                )
                plain.sum().backward()
        except RuntimeError:
            return {"": "SDPA has none"}
        kept: Tensor | float = 1.0
        keys, values = (x.detach().double().repeat_interleave(case.groups, 1) for x in (k, v))
        wide = [x.requires_grad_() for x in (q.detach().double(), keys, values)]
        scores = (wide[0] @ wide[1].mT * width**-0.5).masked_fill(~seen, -torch.inf)
        weights, total = scores.softmax(-1), scores.logsumexp(-1)
        if case.dropout:
            torch.manual_seed(5)
            eye = torch.eye(n, width, device=device, dtype=dtype).expand_as(k).contiguous()
            shown, _ = attention(q, k, eye, *options)
            kept = (shown[..., :n].double() > weights.detach()) / (1 - case.dropout)
        torch.manual_seed(5)
        context, lse = attention(q, k, v, *options)
        grad, shift = torch.randn_like(context), torch.randn_like(lse)
        found = [context, lse, *torch.autograd.grad(
            [context, lse], [q, k, v], [grad, shift])]  # fmt: skip
        chosen = torch._fused_sdp_choice(
            q, k, v, mask, case.dropout, causal, enable_gqa=case.groups > 1
        )
        kernel = (CUDA if q.is_cuda else ON_CPU).get(chosen)
        served = kernel is not None and usable(kernel, q, k, v, mask, case.dropout)
    expected = [(weights * kept) @ wide[2], total]
    slopes = torch.autograd.grad(expected, wide, [grad.double(), shift.double()])
    expected += [slopes[0], *(g.unflatten(1, (-1, case.groups)).sum(2) for g in slopes[1:])]
    worst = max(relative(a, b) for a, b in zip(found, expected, strict=True))
    return {"error": f"{worst:.1e}", "fused": "" if served else " (no kernel)"}


def relative(a: Tensor, b: Tensor) -> float:
    """Return ``|a - b| / |b|``; NaN never passes for small."""
    error = float((a.double() - b).norm() / b.norm())
    return error if error == error else float("inf")


def check(record: Record, tiny: bool) -> None:
    """Fill the table: a row for each kernel and case, a column for each dtype."""
    kernels = KERNELS if torch.cuda.is_available() else {"SDPA's choice": None}
    widths = WIDTHS[:1] if tiny else WIDTHS
    for label, backend in kernels.items():
        for what, case in CASES.items():

            def row(case: Case = case, backend: SDPBackend | None = backend) -> Cells:
                cells, bad = {}, []
                for dtype, bound in BOUNDS.items():
                    name = str(dtype).removeprefix("torch.")
                    some = [errors(case, dtype, width, backend) for width in widths]
                    measured = [e for e in some if "error" in e]
                    worst = max((e for e in measured), key=lambda e: float(e["error"]), default={})
                    scores = any(e["fused"] for e in measured) * " (no kernel)"
                    cells[name] = f"{worst['error']}{scores}" if worst else "SDPA has none"
                    if worst and float(worst["error"]) > bound:
                        bad.append(f"{name} {worst['error']} > {bound:g}")
                if bad:
                    raise AssertionError("not the equation: " + ", ".join(bad))
                return cells

            record.attempt(TITLE, f"{label}, {what}", row, needs=2)
