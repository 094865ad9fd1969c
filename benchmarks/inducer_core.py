"""The attention core with its logsumexp: time and memory, against dense softmax and plain SDPA.

Each measurement of memory is a process of its own that runs one forward and backward; what counts
is how far its resident memory rises meanwhile, looked at every millisecond. (``ru_maxrss`` would
need no looking, but a child starts with its parent's.)

Run: python benchmarks/inducer_core.py [--threads N] [--repeats 7]
Bars at n = 2048: at least 5 times as fast as dense, at most 1.3 times plain SDPA.
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
from timing import console, machine, paired_ratio, show, side_by_side, verdict
from torch import Tensor

from surgery.core import attention

LENGTHS = (256, 512, 1024, 2048, 4096)
BAR_AT, FASTER, SDPA = 2048, 5.0, 1.3


def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal softmax attention and logsumexp from the whole score matrix."""
    n = q.shape[-2]
    scores = q @ k.mT * q.shape[-1] ** -0.5  # (B, H, n, n)
    later = torch.ones(n, n, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(later, float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def core(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return attention(q, k, v, is_causal=True)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True), None


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]] = {
    "core": core,
    "dense": dense,
    "sdpa": sdpa,
}


def step(name: str, n: int) -> Callable[[], None]:
    """Forward and backward; the loss reads the context and, where there is one, the logsumexp."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, 12, n, 64, requires_grad=True) for _ in range(3)]
    seed, shift = torch.randn(1, 12, n, 64), torch.randn(1, 12, n)

    def run() -> None:
        context, lse = WAYS[name](*inputs)
        loss = (context * seed).sum()
        if lse is not None:
            loss = loss + (lse * shift).sum()
        torch.autograd.grad(loss, inputs)

    return run


def resident() -> float:
    """The resident memory of this process, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def grown(name: str, n: int) -> float:
    """MiB by which one step raises the resident memory of this process, at its highest."""
    step(name, 64)()
    run = step(name, n)
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


def memory(name: str, n: int, threads: int) -> float:
    """:func:`grown`, in a fresh process."""
    command = [sys.executable, __file__, "--child", name, str(n), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--child", nargs=2)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        print(grown(args.child[0], int(args.child[1])))
        return
    rows, bars = [], []
    for n in LENGTHS:
        repeats = args.repeats if n <= BAR_AT else 3
        times = side_by_side({name: step(name, n) for name in WAYS}, repeats, warmup=1)
        faster = paired_ratio(times["dense"], times["core"])
        slower = paired_ratio(times["core"], times["sdpa"])
        sizes = [memory(name, n, args.threads) for name in WAYS]
        milliseconds = [f"{1000 * times[name].median:.1f}" for name in WAYS]
        cells = [f"{faster:.2f}", f"{slower:.2f}", *(f"{size:.0f}" for size in sizes)]
        rows.append((str(n), *milliseconds, *cells))
        if n == BAR_AT:
            bars = [("dense / core", faster, FASTER, True), ("core / sdpa", slower, SDPA, False)]
    console.print(machine())
    columns = ["n", "core ms", "dense ms", "sdpa ms", "dense/core", "core/sdpa"]
    columns += [f"{name} MiB" for name in WAYS]
    show("Forward and backward, 12 heads, d = 64, batch 1, causal, float32", columns, rows)
    for name, value, bar, at_least in bars:
        sign = ">=" if at_least else "<="
        console.print(
            f"n = {BAR_AT}: {name} = {value:.2f}, bar {sign} {bar}: {verdict(value, bar, at_least)}"
        )


if __name__ == "__main__":
    main()
