"""Compiled models: LoRA on every projection beside its base and PEFT's.

Run: python benchmarks/compiled.py [--threads N] [--repeats 15] [--processes 3] [--dtype float32]
Bars: a training step and a decoded token <= 1.05 of the base's; compiling no longer than PEFT's.

All three are ``torch.compile(model, fullgraph=True)`` by inductor, and share the memory of their
base weights, which are frozen. All three are given embeddings that require a gradient, so the
backward pass of the base runs through the whole model, too, and computes no gradient of a weight.
Decoding is greedy, one token a call, on a static cache. Compiling is timed in processes of its own,
each with an empty cache, as the first call less a later one.

The floor is what the arithmetic alone adds: the multiplications of the two factors relative to
those of the base in a training step, and the bytes of the weights in decoding.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from timing import line, machine, paired_ratio, plot_bars, sharing, show, side_by_side, verdict
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.utils import logging

import surgery

RANK, ALPHA, TOKENS, PROMPT, DECODED = 16, 32, 128, 32, 8
OF_BASE, OF_PEFT = 1.05, 1.0
SHAPE = {
    "vocab_size": 8000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
TASKS = {"train": "A training step", "decode": f"{DECODED} decoded tokens"}


def base(dtype: torch.dtype) -> Any:
    """Return a frozen model with random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).to(dtype).requires_grad_(False)


def ours(model: Any) -> Any:
    """Return a copy of the base with LoRA on every projection."""
    model = sharing(model)
    surgery.splice(model, surgery.method("lora", rank=RANK, alpha=ALPHA, ports=("all",)))
    surgery.freeze_base(model)
    return model


def theirs(model: Any) -> Any:
    """Return the same as a ``PeftModel``."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    return peft.get_peft_model(sharing(model), config)


MAKERS: dict[str, Callable[[Any], Any]] = {"base": sharing, "ours": ours, "PEFT": theirs}


def compiled(task: str, model: Any, embedding: nn.Module) -> Callable[[], object]:
    """Return a function that does a task once with the compiled model; its first call compiles."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, SHAPE["vocab_size"], (1, TOKENS), generator=generator)
    call = torch.compile(model, fullgraph=True)
    if task == "train":
        model.train()
        given = embedding(ids).detach().requires_grad_()

        def step() -> None:
            call(inputs_embeds=given, labels=ids, use_cache=False).loss.backward()
            given.grad = None
            model.zero_grad()  # as an optimizer leaves it

        return step
    model.eval()
    cache = StaticCache(config=model.config, max_cache_len=2 * TOKENS)
    with torch.no_grad():
        model(input_ids=ids[:, :PROMPT], past_key_values=cache, use_cache=True)

    def decode() -> None:
        token = ids[:, :1].clone()
        with torch.no_grad():
            for _ in range(DECODED):
                logits = call(input_ids=token, past_key_values=cache, use_cache=True).logits
                token = logits[:, -1].argmax(-1, keepdim=True)
        for layer in cache.layers:
            layer.cumulative_length.fill_(PROMPT)

    return decode


def seconds_to_compile(task: str, name: str, dtype: torch.dtype) -> float:
    """Return the seconds of the first call of a compiled model beyond those of a later one."""
    model = base(dtype)
    run = compiled(task, MAKERS[name](model), model.get_input_embeddings())
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds[0] - min(seconds[1:])


def in_fresh_processes(task: str, args: Any) -> dict[str, float]:
    """Return the median seconds to compile by candidate; each process has an empty cache."""
    found: dict[str, list[float]] = {name: [] for name in MAKERS}
    environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    for i in range(args.processes):
        for name in list(MAKERS)[:: -1 if i % 2 else 1]:
            command = [sys.executable, __file__, "--threads", str(args.threads), "--compile", task,
                       name, "--dtype", args.dtype, "--layers", str(args.layers)]  # fmt: skip
            ended = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
            found[name].append(float(ended.stdout.split()[-1]))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def floors(dtype: torch.dtype) -> dict[str, float]:
    """Return what the factors alone add, relative to the base, in each task.

    A training step multiplies each frozen weight twice (the output and the gradient of the input)
    and each factor three times. A decoded token reads every weight once.
    """
    model = base(dtype)
    widths = [m.weight.shape for m in model.modules() if isinstance(m, nn.Linear)]
    whole = sum(out * into for out, into in widths)
    factors = RANK * sum(out + into for out, into in widths[:-1])  # not the head
    return {"train": 1 + 3 * factors / (2 * whole), "decode": 1 + factors / whole}


def report(task: str, args: Any) -> None:
    """Measure one task, and print its table and its bars."""
    dtype = getattr(torch, args.dtype)
    model = base(dtype)
    runs = {
        name: compiled(task, make(model), model.get_input_embeddings())
        for name, make in MAKERS.items()
    }
    times = side_by_side(runs, args.repeats)
    compiling = in_fresh_processes(task, args)
    of_base = {name: paired_ratio(times[name], times["base"]) for name in times}
    rows = [
        (name, f"{1000 * t.median:.1f}", f"{of_base[name]:.3f}", f"{compiling[name]:.1f}",
         f"{100 * t.spread:.0f} %")
        for name, t in times.items()
    ]  # fmt: skip
    title = f"{TASKS[task]}, {args.dtype}, LoRA {RANK} on every projection, compiled"
    show(title, ["", "ms", "of the base", "s to compile", "spread"], rows)
    line(f"floor of the arithmetic: {floors(dtype)[task]:.3f} of the base")
    line(f"ours: {of_base['ours']:.3f} of the base, bar <= {OF_BASE}: "
         f"{verdict(of_base['ours'], OF_BASE)}")  # fmt: skip
    ratio = compiling["ours"] / compiling["PEFT"]
    line(f"compiling: {ratio:.3f} of PEFT's, bar <= {OF_PEFT}: {verdict(ratio, OF_PEFT)}")
    plot_bars(f"{TASKS[task]}, compiled: time relative to the base", {
        "LoRA on all": {name: of_base[name] for name in ("ours", "PEFT")}
    })  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options.add_argument("--repeats", type=int, default=15)
    options.add_argument("--processes", type=int, default=3)
    options.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    options.add_argument("--compile", nargs=2, metavar=("TASK", "NAME"), help=argparse.SUPPRESS)
    args = options.parse_args(arguments)
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # torch's own, about its own parts
    SHAPE["num_hidden_layers"] = args.layers
    if args.compile:
        print(seconds_to_compile(*args.compile, getattr(torch, args.dtype)))
        return
    line(machine())
    for task in args.tasks:
        report(task, args)


if __name__ == "__main__":
    main()
