"""Measure how splicing scales with depth and width, and a training step with sequence length.

Run: python benchmarks/scaling.py [--threads N] [--tiny] [--parts depth meta length adapters]
Bars: locate, capture and splice in a model of 70 billion parameters on the meta device < 60 s and
< 2 GB; the time of a layer does not grow with the depth; loading 64 adapters keeps each under 1 s.

Memory is the highest rise of this process's resident memory; each point has a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from inducer_core import resident
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timing import LINES, console, line, machine, show, verdict
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import surgery

SECONDS, GIGABYTES, STEADY, ADAPTER = 60.0, 2.0, 1.25, 1.0
DEPTHS, WIDTHS, LENGTHS = (
    (2, 4, 8, 16, 32, 64, 128),
    (256, 1024, 4096),
    (512, 1024, 2048, 4096, 8192),
)
SEVENTY = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
METHODS: dict[str, dict[str, Any] | None] = {
    "base": None, "lora": {"rank": 16}, "inducer": {}, "prefix": {"length": 20},
}  # fmt: skip


def shape(layers: int, width: int, heads: int = 8) -> dict[str, int]:
    """Return the sizes of a decoder with a gated FFN."""
    return {
        "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads // 2, "vocab_size": 1000,
    }  # fmt: skip


def build(sizes: dict[str, int], device: str) -> Any:
    """Return a decoder; on the meta device it has no memory."""
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=16384)).eval()


@contextmanager
def rise() -> Iterator[list[float]]:
    """Put into the list, at the end, the highest rise of the resident memory in MiB."""
    gc.collect()
    found: list[float] = []
    before, highest, done = resident(), resident(), threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found.append(max(highest, resident()) - before)


def splicing(sizes: dict[str, int]) -> dict[str, float]:
    """Return seconds and MiB of locate and of splice, which captures; on the meta device."""
    model = build(sizes, "meta")
    with torch.device("meta"):
        ids = torch.zeros(2, 7, dtype=torch.long)
    with rise() as memory:
        start = time.perf_counter()
        sites = surgery.locate(model, {"input_ids": ids})
        located = time.perf_counter()
        surgery.splice(model, surgery.method("lora", ports=("all",)), at=sites)
        spliced = time.perf_counter()
    peak = memory[0]
    return {
        "locate": located - start, "splice": spliced - located, "MiB": peak,
        "process MiB": resident(),
    }  # fmt: skip


def step(sizes: dict[str, int], name: str, length: int, repeats: int) -> dict[str, float]:
    """Return steps a second and the MiB of a training step at one length."""
    model = build(sizes, "cpu")
    if name == "base":
        model.requires_grad_(False)
        model.enable_input_require_grads()
    else:
        surgery.splice(model, surgery.method(name, **(METHODS[name] or {})))
        surgery.freeze_base(model, fresh=False)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained) if trained else None
    times = []

    def run(length: int) -> None:
        ids = torch.randint(3, 1000, (1, length))
        start = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        times.append(time.perf_counter() - start)

    run(16)
    with rise() as memory:
        for _ in range(repeats):
            run(length)
    return {"steps a second": 1 / statistics.median(times[1:]), "MiB": memory[0]}


def adapters(sizes: dict[str, int], count: int) -> dict[str, float]:
    """Return the seconds of the first and last quarter of loading so many, and MiB of each."""
    base, times = build(sizes, "cpu"), []
    with tempfile.TemporaryDirectory() as folder:
        made = build(sizes, "cpu")
        surgery.splice(made, surgery.method("lora", rank=8))
        surgery.save(made, folder)
        with rise() as memory:
            for i in range(count):
                start = time.perf_counter()
                surgery.load(base, folder, name=f"a{i}")
                times.append(time.perf_counter() - start)
    quarter = max(1, count // 4)
    return {
        "all": sum(times), "first": statistics.mean(times[:quarter]),
        "last": statistics.mean(times[-quarter:]), "MiB": memory[0] / count,
    }  # fmt: skip


POINTS: dict[str, Callable[..., dict[str, float]]] = {
    "splicing": splicing, "step": step, "adapters": adapters,
}  # fmt: skip


def point(threads: int, what: str, *given: Any) -> dict[str, float]:
    """Return a point of a curve, measured in a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps([what, *given])]
    command += ["--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{what} {given}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


Ask = Callable[..., dict[str, float]]


def depth(ask: Ask, tiny: bool) -> None:
    """Report locate and splice against depth, and against width."""
    depths = DEPTHS[:2] if tiny else DEPTHS
    rows = []
    curves: dict[str, list[tuple[float, float]]] = {"locate": [], "splice": []}
    cases = [(layers, 256) for layers in depths] + [(8, w) for w in WIDTHS[: 1 if tiny else None]]
    for number, (layers, width) in enumerate(cases):
        found = ask("splicing", shape(layers, width))
        a_layer = 1000 * (found["locate"] + found["splice"]) / layers
        cells = (f"{found['locate']:.2f}", f"{found['splice']:.2f}", f"{a_layer:.0f}")
        rows.append((str(layers), str(width), *cells, f"{found['MiB']:.0f}"))
        if number < len(depths):
            for name, points in curves.items():
                points.append((layers, found[name]))
    columns = ["layers", "width", "locate s", "splice s", "ms a layer", "MiB"]
    show("LoRA on every linear layer, on the meta device", columns, rows)
    LINES["splicing against depth: seconds"] = curves
    for name, points in curves.items():
        (few, less), (many, more) = points[-2:]
        growth = more / less * few / many
        said = verdict(growth, STEADY)
        line(f"{name}, a layer of {many} / of {few}: {growth:.2f}, bar <= {STEADY}: {said}")


def meta(ask: Ask, tiny: bool) -> None:
    """Report a model of 70 billion parameters."""
    found = ask("splicing", {**SEVENTY, **({"num_hidden_layers": 2} if tiny else {})})
    seconds, gigabytes = found["locate"] + found["splice"], found["process MiB"] / 1024
    cells = (f"{found['locate']:.1f}", f"{found['splice']:.1f}", f"{found['MiB']:.0f}")
    columns = ["", "locate s", "splice s", "MiB", "process GiB"]
    layers = 2 if tiny else SEVENTY["num_hidden_layers"]
    show("A model of 70 billion parameters on the meta device", columns,
         [(f"{layers} layers", *cells, f"{gigabytes:.2f}")])  # fmt: skip
    line(f"seconds: {seconds:.1f}, bar <= {SECONDS:.0f}: {verdict(seconds, SECONDS)}")
    line(f"GiB: {gigabytes:.2f}, bar <= {GIGABYTES}: {verdict(gigabytes, GIGABYTES)}")


def length(ask: Ask, tiny: bool) -> None:
    """Report a training step against sequence length."""
    rows = []
    sizes, lengths = (shape(2, 32, 4), (16, 32)) if tiny else (shape(4, 512), LENGTHS)
    curves: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS}
    for n in lengths:
        cells = []
        for name in METHODS:
            found = ask("step", sizes, name, n, 2 if tiny or n > 2048 else 3)
            curves[name].append((n, found["MiB"]))
            cells.append(f"{found['steps a second']:.2f} / {found['MiB']:.0f}")
        rows.append((str(n), *cells))
    layers, width = sizes["num_hidden_layers"], sizes["hidden_size"]
    title = f"A training step, {layers} layers, width {width}: steps a second / MiB"
    show(title, ["n", *METHODS], rows)
    LINES["a training step against length: MiB"] = curves


def many(ask: Ask, tiny: bool) -> None:
    """Report the loading of many adapters."""
    count = 3 if tiny else 64
    found = ask("adapters", shape(2, 32, 4) if tiny else shape(12, 256), count)
    cells = (f"{found['all']:.1f}", f"{found['first']:.3f}", f"{found['last']:.3f}")
    columns = ["adapters", "all s", "each, first quarter s", "last quarter s", "MiB each"]
    show("Loading adapters", columns, [(str(count), *cells, f"{found['MiB']:.1f}")])
    said = verdict(found["last"], ADAPTER)
    line(f"one of the last adapters: {found['last']:.2f} s, bar <= {ADAPTER:.0f} s: {said}")


PARTS = {"depth": depth, "meta": meta, "length": length, "adapters": many}


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options.add_argument("--tiny", action="store_true", help="small sizes, for a trial")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--child")
    args = options.parse_args(arguments)
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    if args.child:
        what, *given = json.loads(args.child)
        with contextlib.redirect_stdout(io.StringIO()):
            found = POINTS[what](*given)
        print(json.dumps(found))
        return
    line(machine())
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        total = {"depth": 3 if args.tiny else 10, "meta": 1, "length": 8 if args.tiny else 20,
                 "adapters": 1}  # fmt: skip
        bar = progress.add_task("", total=sum(total[name] for name in args.parts))

        def ask(what: str, *given: Any) -> dict[str, float]:
            progress.update(bar, description=f"{what} {' '.join(map(str, given[1:]))}")
            here = args.tiny  # a process of its own takes seconds to start
            found = POINTS[what](*given) if here else point(args.threads, what, *given)
            progress.advance(bar)
            return found

        for name in args.parts:
            PARTS[name](ask, args.tiny)


if __name__ == "__main__":
    main()
