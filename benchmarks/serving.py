"""Serve many LoRA adapters in one batch: a route, PEFT's mixed batch, one merged model.

Run: python benchmarks/serving.py [--threads N] [--repeats 9] [--adapters 4 16 64]
Every row of a batch of 16 has an adapter; with 64 adapters each batch has 16 of them, other ones in
each call. The merged model has one adapter for all rows, in its weights: what no route can beat.
Bar: a mixed batch takes no longer than PEFT's.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
from timing import line, machine, paired_ratio, plot_bars, sharing, show, side_by_side, verdict
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import surgery

BATCH, RANK, NEVER_SLOWER = 16, 8, 1.0
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
}


def ours(base: Any, adapters: int) -> Any:
    """Return a copy of the base with so many adapters."""
    model = sharing(base)
    surgery.splice(model, surgery.method("lora", rank=RANK), name="a0")
    for i in range(1, adapters):
        surgery.copy(model, "a0", f"a{i}")
    for name, parameter in surgery.spliced_parameters(model):
        torch.manual_seed(sum(map(ord, name)))
        nn.init.normal_(parameter, std=0.05)
    surgery.freeze_base(model)
    return model.eval()


def theirs(base: Any, adapters: int) -> Any:
    """Return the same as a ``PeftModel``."""
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(sharing(base), config, adapter_name="a0")
    for i in range(1, adapters):
        model.add_adapter(f"a{i}", config)
    return model.eval()


def routes(adapters: int) -> Iterator[list[str]]:
    """Yield the adapter of each row, for one batch after the other; the same for everyone."""
    draw = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(max(adapters, BATCH), generator=draw)[:BATCH]
        yield [f"a{int(i) % adapters}" for i in order]


def candidates(
    base: Any, adapters: int, call: Callable[..., object]
) -> dict[str, Callable[[], object]]:
    """Return what is timed: ``call(model, **options)`` of a mixed batch in each way."""
    spliced, wrapped = ours(base, adapters), theirs(base, adapters)
    merged = ours(copy.deepcopy(base), 1)  # a merge writes into weights that the others would share
    surgery.merge(merged)
    for_us, for_them = routes(adapters), routes(adapters)

    def routed() -> None:
        with surgery.route(next(for_us), spliced):
            call(spliced)

    return {
        "merged": lambda: call(merged),
        "ours": routed,
        "PEFT": lambda: call(wrapped, adapter_names=next(for_them)),
    }


def largest_differences(base: Any, adapters: int, ids: Tensor) -> tuple[float, float]:
    """Return how far a routed batch is from each row run with its adapter alone, and from the base.

    The second number shows that the first compares outputs that the adapters have changed.
    """
    model, names = ours(base, adapters), next(routes(adapters))
    with torch.no_grad():
        with surgery.route(names, model):
            together = model(input_ids=ids).logits
        alone = []
        for row, name in zip(ids, names, strict=True):
            with surgery.using(model, name):
                alone.append(model(input_ids=row[None]).logits)
        plain = base(input_ids=ids).logits
    return float((together - torch.cat(alone)).abs().max()), float((together - plain).abs().max())


def unchanged(base: Any, before: list[Tensor]) -> bool:
    """Whether no candidate has written into the weights that all of them share."""
    return all(torch.equal(x, y) for x, y in zip(base.parameters(), before, strict=True))


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options.add_argument("--repeats", type=int, default=9)
    options.add_argument("--adapters", type=int, nargs="+", default=[4, 16, 64])
    options.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    args = options.parse_args(arguments)
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    line(machine())
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": args.layers})).eval()
    before = [parameter.detach().clone() for parameter in base.parameters()]
    ids = torch.randint(3, SHAPE["vocab_size"], (BATCH, 32))

    def prefill(model: Any, **given: Any) -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False, logits_to_keep=1, **given)

    def decode(model: Any, **given: Any) -> None:
        with torch.no_grad():
            model.generate(
                input_ids=ids[:, :4], attention_mask=torch.ones_like(ids[:, :4]), do_sample=False,
                max_new_tokens=8, min_new_tokens=8, pad_token_id=0, **given,
            )  # fmt: skip

    for what, call in {
        "Prefill of 32 tokens": prefill,
        "Greedy decoding of 8 tokens": decode,
    }.items():
        title = f"{what}, batch {BATCH}, LoRA {RANK} on query and value, a mixed batch"
        rows, bars = [], {}
        for adapters in args.adapters:
            times = side_by_side(candidates(base, adapters, call), args.repeats, warmup=2)
            of = {name: {n: paired_ratio(times[n], times[name]) for n in times} for name in times}
            cells = [f"{1000 * timing.median:.0f}" for timing in times.values()]
            ratios = f"{of['merged']['ours']:.3f}", f"{of['merged']['PEFT']:.3f}"
            spread = f"{100 * max(t.spread for t in times.values()):.0f} %"
            rows.append((str(adapters), *cells, *ratios, f"{of['PEFT']['ours']:.3f}", spread))
            bars[f"{adapters} adapters"] = {n: of["merged"][n] for n in ("ours", "PEFT")}
        columns = ["adapters", "merged ms", "ours ms", "PEFT ms", "ours / merged", "PEFT / merged",
                   "ours / PEFT", "spread"]  # fmt: skip
        show(title, columns, rows)
        for row in rows:
            ratio = float(row[6])
            line(f"{row[0]}: {ratio:.3f} of PEFT's, bar <= 1: {verdict(ratio, NEVER_SLOWER)}")
        plot_bars(f"{what}: time relative to a merged model", bars)
    for adapters in args.adapters:
        gap, effect = largest_differences(base, adapters, ids)
        line(
            f"{adapters} adapters: largest difference from each row alone {gap:.1e}, from the base "
            f"{effect:.1e}"
        )
    line(f"the weights of the base are as they were: {unchanged(base, before)}")


if __name__ == "__main__":
    main()
