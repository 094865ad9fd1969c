"""Time the inducer core, attention with its logsumexp, against SDPA's flash kernel and dense."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.record import Bar, Record
from benchmarks.gpu.speed import Run, race
from benchmarks.timing import paired_ratio
from surgery.attention.sdpa import attention

LENGTHS, JUDGED = (1024, 2048, 4096, 8192, 16384), 8192
HEADS, WIDTH = 32, 64
BARS = {
    "core": Bar(f"inducer core, of SDPA-flash, n = {JUDGED}", 1.25),
    "dense": Bar(f"dense, of the inducer core, n = {JUDGED}", 10.0, at_least=True),
}


def flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
    """Compute attention by SDPA, which returns no logsumexp."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True), None


def core(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Compute attention and its logsumexp as the inducer does."""
    return attention(q, k, v, is_causal=True)


def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Compute attention and its logsumexp from the whole score matrix."""
    n = q.shape[-2]
    later = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(later, float("-inf"))  # (B, H, n, n)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


WAYS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "SDPA-flash": flash,
    "core": core,
    "dense": dense,
}


def step(name: str, n: int, device: str) -> Run:
    """Return a forward and backward, causal; the loss reads the logsumexp, if there is one."""
    torch.manual_seed(0)
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    shape = (1, HEADS if device == "cuda" else 2, n, WIDTH)
    inputs = [torch.randn(shape, device=device, dtype=kind).requires_grad_() for _ in range(3)]
    seed, shift = torch.randn_like(inputs[0]), torch.randn(shape[:-1], device=device)

    def run() -> None:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            context, lse = WAYS[name](*inputs)
        outputs = [context] if lse is None else [context, lse]
        torch.autograd.grad(outputs, inputs, [seed, shift.to(outputs[-1].dtype)][: len(outputs)])

    return run


def bytes_of_dense(n: int) -> float:
    """Return about how much memory dense takes: seven score matrices, some in float32."""
    return HEADS * n * n * 2 * 10.0


def check(record: Record, tiny: bool) -> None:
    """Fill a table for each length; the width of a head is that of GPT-2 small and Llama-3.2-1B."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    curves = record.curves.setdefault("The inducer core, forward and backward (ms)", {})
    memory = record.curves.setdefault("The inducer core, memory above its inputs (MiB)", {})
    for n in (32, 64) if tiny else LENGTHS:
        title = f"Forward and backward of attention, n = {n}, causal, bfloat16, {HEADS} heads of 64"
        made = {name: lambda name=name, n=n: step(name, n, device) for name in WAYS}
        if device == "cuda" and bytes_of_dense(n) > torch.cuda.mem_get_info()[0]:
            made.pop("dense")
            record.row(title, "dense", {"": f"about {bytes_of_dense(n) / 2**30:.0f} GiB: left out"})
        times = race(record, title, made, 0.2 if tiny else 3, beside="SDPA-flash")
        for name, timing in times.items():
            curves.setdefault(name, []).append((n, 1000 * timing.median))
            above = record.tables[title][name].get("MiB above weights")
            if above:
                memory.setdefault(name, []).append((n, float(above)))
        if n == (64 if tiny else JUDGED) and "core" in times:
            if "SDPA-flash" in times:
                record.measured("core", paired_ratio(times["core"], times["SDPA-flash"]))
            if "dense" in times:
                record.measured("dense", paired_ratio(times["dense"], times["core"]))
