"""Measure time and memory of attention with its logsumexp, against dense softmax and plain SDPA.

Memory is measured in a process of its own, which runs one forward and backward and reads its
resident memory every millisecond; the result is the highest rise. (``ru_maxrss`` would need no
polling, but a child process starts with its parent's maximum.)

Run: python benchmarks/inducer_core.py [--threads N] [--repeats 7]
Bars at n = 2048: at least 6 times as fast as dense, at most 1.2 times plain SDPA.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import LINES, line, machine, paired_ratio, show, side_by_side, verdict
from torch import Tensor

from surgery.attention.sdpa import attention

LENGTHS = (256, 512, 1024, 2048, 4096)
BAR_AT, FASTER, SDPA = 2048, 6.0, 1.2
CASES = {
    "causal": "12 heads",
    "padded": "12 heads, additive mask: causal, and a tenth of the keys is padding",
    "grouped": "12 heads of queries, 4 of keys and values, causal",
}


def mask_of(case: str, n: int) -> Tensor | None:
    """Return the additive mask (1, 1, n, n) of a case; None if the causal flag is enough."""
    if case != "padded":
        return None
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    hidden[:, -(n // 10) :] = True
    return torch.zeros(1, 1, n, n).masked_fill(hidden, float("-inf"))


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute attention and its logsumexp from the whole score matrix."""
    n, groups = q.shape[-2], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5  # (B, H, n, n)
    if mask is None:
        later = torch.ones(n, n, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    else:
        scores = scores + mask
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def core(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute attention and its logsumexp by ``surgery.attention``."""
    return attention(q, k, v, mask, is_causal=mask is None, enable_gqa=k.shape[1] < q.shape[1])


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
    """Compute attention by PyTorch's SDPA, which returns no logsumexp."""
    grouped = k.shape[1] < q.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, enable_gqa=grouped
    ), None


WAYS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "core": core,
    "dense": dense,
    "sdpa": sdpa,
}


def step(name: str, case: str, n: int) -> Callable[[], None]:
    """Return a forward and backward; the loss reads the context and the logsumexp, if any."""
    torch.manual_seed(0)
    heads = (12, 4, 4) if case == "grouped" else (12, 12, 12)
    inputs = [torch.randn(1, h, n, 64, requires_grad=True) for h in heads]
    seed, shift, mask = torch.randn(1, 12, n, 64), torch.randn(1, 12, n), mask_of(case, n)

    def run() -> None:
        context, lse = WAYS[name](*inputs, mask)
        loss = (context * seed).sum()
        if lse is not None:
            loss = loss + (lse * shift).sum()
        torch.autograd.grad(loss, inputs)

    return run


def resident() -> float:
    """Return the resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def grown(name: str, case: str, n: int) -> float:
    """Return the highest rise of this process's resident memory during one step, in MiB."""
    step(name, case, 64)()
    run = step(name, case, n)
    before = highest = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return highest - before


def memory(name: str, case: str, n: int, threads: int) -> float:
    """Return :func:`grown`, measured in a fresh process."""
    command = [sys.executable, __file__, "--child", name, case, str(n)]
    command += ["--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def measure(case: str, repeats: int, threads: int) -> None:
    """Measure one case at every length, and report a table, the bars and the curves."""
    rows, bars = [], []
    curves: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    peaks: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for n in LENGTHS:
        some = repeats if n <= BAR_AT else 3
        times = side_by_side({name: step(name, case, n) for name in WAYS}, some, warmup=1)
        faster = paired_ratio(times["dense"], times["core"])
        slower = paired_ratio(times["core"], times["sdpa"])
        sizes = [memory(name, case, n, threads) for name in WAYS]
        milliseconds = [f"{1000 * times[name].median:.1f}" for name in WAYS]
        cells = [f"{faster:.2f}", f"{slower:.2f}", *(f"{size:.0f}" for size in sizes)]
        rows.append((str(n), *milliseconds, *cells))
        for name, size in zip(WAYS, sizes, strict=True):
            curves[name].append((n, 1000 * times[name].median))
            peaks[name].append((n, size))
        if n == BAR_AT:
            bars = [("dense / core", faster, FASTER, True), ("core / sdpa", slower, SDPA, False)]
    columns = ["n", "core ms", "dense ms", "sdpa ms", "dense/core", "core/sdpa"]
    columns += [f"{name} MiB" for name in WAYS]
    show(f"Forward and backward, d = 64, batch 1, float32: {CASES[case]}", columns, rows)
    LINES[f"attention, {case}: ms"] = curves
    LINES[f"attention, {case}: peak MiB"] = peaks
    for name, value, bar, at_least in bars:
        sign = ">=" if at_least else "<="
        line(
            f"n = {BAR_AT}: {name} = {value:.2f}, bar {sign} {bar}: {verdict(value, bar, at_least)}"
        )
    growth = peaks["core"][-1][1] / peaks["core"][-2][1]
    line(f"memory of the core from n = 2048 to 4096: times {growth:.2f}")


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--child", nargs=3)
    args = options.parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.child:
        print(grown(args.child[0], args.child[1], int(args.child[2])))
        return
    line(machine())
    for case in CASES:
        measure(case, args.repeats, args.threads)


if __name__ == "__main__":
    main()
