"""Measure a training step and a decoded token of each method on GPT-2 small, against PEFT.

Every model is GPT-2 small with random weights and gets the same inputs. PEFT runs with its default
targets for GPT-2: its LoRA and (IA)^3 act on the whole fused projection.

Run: python benchmarks/methods.py [--threads N] [--repeats 7] [--only decode] [--methods prefix]
Bars: never slower than PEFT for the same method; decoding takes with LoRA at most 1.03 times, and
with merged LoRA at most 1.02 times, as long as the base.
"""

from __future__ import annotations

import argparse
import copy
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import peft
import torch
import torch.nn.functional as F
from timing import (
    line,
    machine,
    paired_ratio,
    plot_bars,
    sharing,
    show,
    side_by_side,
    verdict,
)
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

import surgery
from surgery.attention.sdpa import attention

NEVER_SLOWER, LORA, MERGED = 1.0, 1.03, 1.02
OURS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8},
    "prefix": {"length": 20},
    "prompt": {"length": 20},
    "ia3": {},
    "inducer": {},
    "inducer_lora": {},
    "mam_inducer": {},
    "ffn_adapter": {"rank": 64},
    "bitfit": {},
    "ntk_attention": {},
}
Run = Callable[[Any], Callable[[], None]]
LANGUAGE = {"task_type": "CAUSAL_LM"}
THEIRS: dict[str, Any] = {
    "lora": peft.LoraConfig(r=8, lora_alpha=16, fan_in_fan_out=True, **LANGUAGE),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=20, **LANGUAGE),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=20, **LANGUAGE),
    "ia3": peft.IA3Config(fan_in_fan_out=True, **LANGUAGE),
}


def theirs(base: Any, name: str) -> Any:
    """Return a copy of the base with PEFT's version of a method."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings that PEFT raises
        return peft.get_peft_model(sharing(base), THEIRS[name]).eval()


def tuned(base: Any, name: str, **options: Any) -> Any:
    """Return a copy of the base with a method spliced in and the base frozen."""
    model = sharing(base)
    surgery.splice(model, surgery.method(name, **options))
    surgery.freeze_base(model, fresh=False)
    return model


def training_step(model: Any, ids: Tensor) -> Callable[[], None]:
    """Return a forward, backward and one step of AdamW."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def run() -> None:
        model.train()
        loss = model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def decoding(model: Any, prompt: Tensor, tokens: int) -> Callable[[], None]:
    """Return a greedy generation with the KV cache; the prompts of a batch differ in length."""
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    for i, row in enumerate(mask):
        row[: i * prompt.shape[1] // (2 * len(mask))] = 0  # padding on the left

    def run() -> None:
        model.eval()
        with torch.no_grad():
            model.generate(
                input_ids=prompt, attention_mask=mask, max_new_tokens=tokens,
                min_new_tokens=tokens, **settings,
            )  # fmt: skip

    return run


def compare(
    title: str, run: Run, base: Any, beside: str, repeats: int, methods: Iterable[str] = OURS
) -> dict[str, float]:
    """Time each method side by side with PEFT's version of it and with ``beside``.

    Args:
        run: makes from a model what is timed.
        beside: the baseline's name: ``base`` is the base itself, any other a copy to be trained.

    Returns:
        The time of each method, as a multiple of the baseline's.
    """
    rows, ratios = [], {}
    bars: dict[str, dict[str, float]] = {}
    for name in methods:
        options = OURS[name]
        first = sharing(base) if beside == "base" else copy.deepcopy(base)  # its weights change
        candidates = {beside: run(first), "ours": run(tuned(base, name, **options))}
        if name in THEIRS:
            candidates["PEFT"] = run(theirs(base, name))
        if name == "lora" and beside == "base":
            merged = tuned(base, name, **options)
            surgery.merge(merged)
            candidates["merged"] = run(merged)
        times = side_by_side(candidates, repeats, warmup=1)
        others = {n: t for n, t in times.items() if n != beside}
        bars[name] = {n: paired_ratio(t, times[beside]) for n, t in others.items()}
        cells = [
            f"{1000 * times[n].median:.0f}" if n in times else "" for n in (beside, "ours", "PEFT")
        ]
        ratio = paired_ratio(times["ours"], times[beside])
        if "merged" in times:
            ratios["lora, merged"] = paired_ratio(times["merged"], times[beside])
        ratios[name], of_peft = ratio, ""
        if "PEFT" in times:
            of_peft = f"{paired_ratio(times['ours'], times['PEFT']):.3f}"
        spread = f"{100 * max(t.spread for t in times.values()):.0f} %"
        rows.append((name, *cells, f"{ratio:.3f}", of_peft, spread))
    columns = [
        "",
        f"{beside} ms",
        "ours ms",
        "PEFT ms",
        f"ours / {beside}",
        "ours / PEFT",
        "spread",
    ]
    show(title, columns, rows)
    for row in rows:
        if row[5]:
            value = float(row[5])
            line(f"{row[0]}: {value:.3f} of PEFT's, bar <= 1: {verdict(value, NEVER_SLOWER)}")
    plot_bars(f"{title}: time relative to {beside}", bars)
    return ratios


def concatenated(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Compute prefix-tuning by concatenation: longer keys and a mask of the visible ones."""
    n, length = q.shape[-2], keys.shape[-2]
    mask = torch.ones(n, length + n, dtype=torch.bool).tril(length)
    k = torch.cat([keys.expand(len(k), -1, -1, -1), k], 2)
    v = torch.cat([values.expand(len(v), -1, -1, -1), v], 2)
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def virtual(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Compute prefix-tuning from ``(query, context, lse)`` of attention without a prefix."""
    context, lse = attention(q, k, v, is_causal=True)
    merged = context.transpose(1, 2).flatten(2)
    return surgery.virtual_tokens(merged, q, lse, keys, values, q.shape[-1] ** -0.5)


def long_prefix(repeats: int) -> None:
    """Time 108 virtual tokens at n = 1024: attention alone, and a training step of the model."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, 12, 1024, 64, requires_grad=True) for _ in range(3)]
    inputs += [torch.randn(12, 108, 64, requires_grad=True) for _ in range(2)]
    gap = (concatenated(*inputs) - virtual(*inputs)).abs().max().item()

    def step(way: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(way(*inputs).sum(), inputs)

    ways: dict[str, Callable[[], object]] = {
        "attention: from lse": step(virtual),
        "attention: concatenated": step(concatenated),
    }
    base = GPT2LMHeadModel(GPT2Config(n_positions=2048))
    ids = torch.randint(0, 50257, (1, 1024))
    config = peft.PrefixTuningConfig(num_virtual_tokens=108, **LANGUAGE)
    ways["training step: ours"] = training_step(tuned(base, "prefix", length=108), ids)
    ways["training step: PEFT"] = training_step(peft.get_peft_model(base, config), ids)
    times = side_by_side(ways, repeats, warmup=1)
    rows = [(name, f"{1000 * t.median:.1f}") for name, t in times.items()]
    show("Prefix of 108 at n = 1024, forward and backward", ["", "ms"], rows)
    names = list(ways)
    for ours, theirs in (names[:2], names[2:]):
        ratio = paired_ratio(times[ours], times[theirs])
        line(f"{ours}: {ratio:.3f} of the other")
    line(f"largest difference of the two attentions' outputs: {gap:.1e}")


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--only", choices=("train", "decode"), help="measure this part alone")
    options.add_argument("--methods", nargs="+", choices=OURS, default=list(OURS))
    args = options.parse_args(arguments)
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    line(machine())
    ids = torch.randint(0, 50257, (4, 128), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config()).eval()

    def train(model: Any) -> Callable[[], None]:
        return training_step(model, ids)

    def decode(model: Any) -> Callable[[], None]:
        return decoding(model, ids[:1, :32], 16)

    if args.only != "decode":
        title = "A training step, GPT-2 small, batch 4 x 128, float32"
        compare(title, train, base, "full fine-tuning", args.repeats, args.methods)
    if args.only != "train":
        title = "Greedy decoding of 16 tokens behind 32, batch 1, KV cache"
        ratios = compare(title, decode, base, "base", 2 * args.repeats, args.methods)
        for name, bar in (("lora", LORA), ("lora, merged", MERGED)):
            if name in ratios:
                ratio = ratios[name]
                line(f"{name}: {ratio:.3f} of base, bar <= {bar}: {verdict(ratio, bar)}")
        several = torch.randint(0, 50257, (8, 128), generator=torch.Generator().manual_seed(2))
        title = "Greedy decoding of 16 tokens, a batch of 8 behind up to 128, padded on the left"
        both = [name for name in args.methods if name in THEIRS]
        compare(title, lambda m: decoding(m, several, 16), base, "base", args.repeats, both)
    if args.only is None:
        long_prefix(args.repeats)


if __name__ == "__main__":
    main()
