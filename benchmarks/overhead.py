"""Measure the overhead of a splice: GPT-2 small with identities spliced in, against the original.

Run: python benchmarks/overhead.py [--threads N] [--repeats 40] [--profile]
Bars: forward <= 1.02 times the original, a decoded token <= 1.05, splice <= 2 s; a model of seven
billion parameters on the meta device <= 10 s.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timing import (
    Timing,
    console,
    line,
    machine,
    paired_ratio,
    sharing,
    show,
    side_by_side,
    verdict,
)
from torch import Tensor, nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import surgery

FORWARD, DECODE, SPLICE, META = 1.02, 1.05, 2.0, 10.0


@dataclass(frozen=True)
class Nothing(surgery.Method):
    """Insert an identity after the output of every attention and FFN."""

    name = "nothing"
    kinds = ("attention", "ffn")

    def splice(self, site: surgery.Site) -> None:
        site.port("output").insert(nn.Identity(), name=self.name)


def decoder(model: nn.Module, prompt: Tensor, tokens: int) -> Callable[[], None]:
    """Return a greedy decoding of ``tokens`` tokens, one at a time, after a prefilled cache.

    Its attribute ``seconds`` is the time of the tokens alone, without the prefill.
    """

    def decode() -> None:
        with torch.no_grad():
            cache = DynamicCache()
            model(input_ids=prompt, past_key_values=cache, use_cache=True)
            token = prompt[:, -1:]
            start = time.perf_counter()
            for _ in range(tokens):
                out = model(input_ids=token, past_key_values=cache, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            decode.seconds = time.perf_counter() - start  # type: ignore[attr-defined]

    return decode


def forward(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    """Return one forward without a cache."""

    def run() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)

    return run


def profiled(title: str, run: Callable[[], object], times: int) -> None:
    """Print the functions of surgery in which ``run`` spends most time."""
    run()
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(times):
        run()
    profile.disable()
    console.rule(title)
    pstats.Stats(profile).sort_stats("tottime").print_stats("surgery", 14)


def seven_billion() -> float:
    """Return the seconds to locate and splice a model that exists only on the meta device."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
        ids = torch.zeros(2, 7, dtype=torch.long)
    start = time.perf_counter()
    methods = [surgery.method("inducer"), surgery.method("lora", ports=("query", "value"))]
    surgery.splice(model, methods, example_inputs={"input_ids": ids})
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options.add_argument("--repeats", type=int, default=30)
    options.add_argument("--profile", action="store_true")
    args = options.parse_args(arguments)
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    spliced = sharing(model)
    start = time.perf_counter()
    surgery.splice(spliced, Nothing())
    seconds = time.perf_counter() - start

    ids = torch.randint(0, 50257, (4, 128))
    again = sharing(model)
    forwards = {
        "original": forward(model, ids),
        "spliced": forward(spliced, ids),
        "original again": forward(again, ids),
    }
    first = side_by_side(forwards, args.repeats)
    ratio = paired_ratio(first["spliced"], first["original"])
    noise = {"forward": paired_ratio(first["original again"], first["original"])}
    rows = [
        (
            "forward, batch 4 x 128",
            *(f"{1000 * first[n].median:.2f} ms" for n in ("original", "spliced")),
            f"{ratio:.3f}",
            f"<= {FORWARD}",
            verdict(ratio, FORWARD),
        )
    ]
    prompt, tokens = ids[:1, :32], 8
    models = {"original": model, "spliced": spliced, "original again": again}
    caches = {name: decoder(m, prompt, tokens) for name, m in models.items()}
    steps: dict[str, list[float]] = {name: [] for name in caches}

    def timed(name: str) -> Callable[[], None]:
        def run() -> None:
            caches[name]()
            steps[name].append(caches[name].seconds / tokens)  # type: ignore[attr-defined]

        return run

    side_by_side({name: timed(name) for name in caches}, args.repeats)
    second = {name: Timing(tuple(s[3:])) for name, s in steps.items()}
    ratio = paired_ratio(second["spliced"], second["original"])
    noise["token"] = paired_ratio(second["original again"], second["original"])
    rows += [
        (
            "one token, KV cache of 32 to 40",
            *(f"{1000 * second[n].median:.2f} ms" for n in ("original", "spliced")),
            f"{ratio:.3f}",
            f"<= {DECODE}",
            verdict(ratio, DECODE),
        ),
        (
            "locate + capture + splice, 24 sites",
            "",
            f"{seconds:.2f} s",
            "",
            f"<= {SPLICE:.0f} s",
            verdict(seconds, SPLICE),
        ),
    ]
    seconds = seven_billion()
    row = ("the same for 6.7 billion parameters on the meta device, 32 of 64 sites", "")
    rows.append((*row, f"{seconds:.2f} s", "", f"<= {META:.0f} s", verdict(seconds, META)))
    line(machine())
    columns = ["GPT-2 small, random weights", "original", "spliced", "ratio", "bar", "verdict"]
    show("Cost of a spliced host with nothing in it (medians)", columns, rows)
    ratios = ", ".join(f"{what} {value:.3f}" for what, value in noise.items())
    line(f"the original against a copy of itself, for the noise of this machine: {ratios}")
    with torch.no_grad():
        same = torch.equal(model(input_ids=ids).logits, spliced(input_ids=ids).logits)
    graphs = sorted({len(v) for v in surgery.variants(spliced).values()})
    line(f"outputs equal bit for bit: {same}; graphs per host: {graphs}")
    if args.profile:
        profiled("forward", forwards["spliced"], 10)
        profiled("decode", caches["spliced"], 5)


if __name__ == "__main__":
    main()
