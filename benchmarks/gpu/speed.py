"""Time training steps and decoding in bfloat16: ours, PEFT's and the base, side by side."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import models
from benchmarks.gpu.record import Bar, Cells, Record
from benchmarks.timing import Timing, paired_ratio, side_by_side

Run = Callable[[], None]
BASE, LORA, PREFIX = "base", "LoRA 16 on all linear", "prefix 108"
BARS = {
    "lora step": Bar(f"{LORA}, training step, of PEFT's, eager, Llama shape", 0.92),
    "prefix step": Bar(f"{PREFIX}, training step at n = 4096, of PEFT's", 0.8),
}
TRAINED: dict[str, models.Make] = {
    BASE: models.frozen,
    LORA: models.lora,
    f"{LORA}, PEFT": models.peft_lora,
    "inducer": models.ours("inducer"),
    "FFN adapter 64": models.ours("ffn_adapter", rank=64),
}
PREFIXED: dict[str, models.Make] = {
    BASE: models.frozen,
    PREFIX: models.ours("prefix", length=108),
    f"{PREFIX}, PEFT": models.peft_prefix(108),
}
COMPILED = {name: TRAINED[name] for name in (LORA, f"{LORA}, PEFT")}
DECODED: dict[str, models.Make] = {
    BASE: models.sharing,
    LORA: models.lora,
    f"{LORA}, merged": models.merged,
    f"{LORA}, PEFT": models.peft_lora,
    "prefix 20": models.ours("prefix", length=20),
    "prefix 20, PEFT": models.peft_prefix(20),
    "inducer": models.ours("inducer"),
}


def sync() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def training(model: Any, ids: Tensor, compile_it: str = "") -> Run:
    """Return a forward, backward and step of AdamW; ``compile_it`` names a backend, if any."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5) if trained else None
    forward = torch.compile(model, backend=compile_it) if compile_it else model

    def run() -> None:
        forward(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return run


def decoding(model: Any, ids: Tensor, new: int, cache: str) -> Run:
    """Return a greedy generation of ``new`` tokens; no forward is compiled."""
    model.eval()
    mask = torch.ones_like(ids)
    settings = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
    if cache == "static":
        settings |= {"cache_implementation": "static", "disable_compile": True}

    def run() -> None:
        with torch.no_grad():
            model.generate(input_ids=ids, attention_mask=mask, **settings)

    return run


def race(
    record: Record,
    title: str,
    candidates: dict[str, Callable[[], Run]],
    seconds: float,
    per: int = 1,
    needs: float = 4.0,
    limit: float = 60.0,
    beside: str = "",
) -> dict[str, Timing]:
    """Time candidates by turns, and fill a table with a row for each.

    Args:
        candidates: what makes each; it is tried alone first, where its memory is measured.
        seconds: how long the timed rounds may take in all.
        per: how many tokens a run decodes; times are given for one.
        beside: the candidate that the times of the others are multiples of, if any.
        needs, limit: as for ``Record.attempt``, for the first try of each.

    Returns:
        the timings of those that ran.
    """
    ready: dict[str, Callable[[], object]] = {}
    for name, make in candidates.items():

        def first(name: str = name, make: Callable[[], Run] = make) -> Cells:
            run = make()
            run()
            sync()
            ready[name] = lambda: (run(), sync())
            if not torch.cuda.is_available():
                return {}
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            rise = torch.cuda.max_memory_allocated() - before
            return {"MiB above weights": f"{rise / 2**20:.0f}"}

        if not record.attempt(title, name, first, needs, limit, ours="PEFT" not in name):
            ready.pop(name, None)
    times: dict[str, Timing] = {}

    def rounds() -> Cells:
        probe = side_by_side(ready, 2, warmup=1)
        once = sum(t.median for t in probe.values())
        times.update(side_by_side(ready, max(3, min(20, int(seconds / once))), warmup=0))
        return {"": f"{len(next(iter(times.values())).seconds)} rounds"}

    if not ready or not record.attempt(title, "(timed)", rounds, needs, 2 * seconds + limit):
        return {}
    record.tables[title].pop("(timed)")
    for name, timing in times.items():
        cells = {"ms": f"{1000 * timing.median / per:.2f}"}
        if beside in times:
            cells[f"of {beside}"] = f"{paired_ratio(timing, times[beside]):.3f}"
        if f"{name}, PEFT" in times:
            cells["of PEFT's"] = f"{paired_ratio(timing, times[f'{name}, PEFT']):.3f}"
        cells["spread"] = f"{100 * timing.spread:.0f} %"
        record.row(title, name, cells)
    free()
    return times


def free() -> None:
    """Give memory back between races."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def bar(record: Record, key: str, times: dict[str, Timing], ours: str) -> None:
    """Judge ours against PEFT's, where both ran."""
    if ours in times and f"{ours}, PEFT" in times:
        record.measured(key, paired_ratio(times[ours], times[f"{ours}, PEFT"]))


def steps(record: Record, tiny: bool) -> None:
    """Time training steps, and those of a long prefix; no weight of the base has a gradient."""
    pace = 0.2 if tiny else 6
    for name in (models.LLAMA_NAME, models.GPT2_NAME):
        base = _base(name, tiny)
        batch, length = (2, 16) if tiny else (4, 1024)
        title = f"Training step, {name}, batch {batch} x {length}, bfloat16"
        times = race(record, title, _of(TRAINED, base, batch, length), pace, beside=BASE)
        if name == models.LLAMA_NAME:
            bar(record, "lora step", times, LORA)
            for length, batch in ((8, 1), (16, 1)) if tiny else ((1024, 4), (4096, 1)):
                title = f"Training step with a prefix, {name}, batch {batch} x {length}"
                made = _of(PREFIXED, base, batch, length)
                times = race(record, title, made, pace, beside=BASE)
            bar(record, "prefix step", times, PREFIX)
        base = None
        free()


def decode(record: Record, tiny: bool) -> None:
    """Time greedy decoding, batch 1 and 8, with either cache."""
    new, length = (4, 6) if tiny else (32, 64)
    for name in (models.LLAMA_NAME, models.GPT2_NAME):
        base = _base(name, tiny)
        for batch in (1,) if tiny and name == models.GPT2_NAME else (1, 8):
            ids = models.tokens(base, batch, length)
            for cache in ("dynamic", "static"):
                title = f"A decoded token, {name}, batch {batch}, {cache} cache"
                made = _decoders(base, ids, new, cache)
                race(record, title, made, 0.2 if tiny else 7, per=new, beside=BASE)
        base = made = None
        free()


def compiled(record: Record, tiny: bool) -> None:
    """Time compiled training steps; compiling takes most of the time."""
    for name in (models.LLAMA_NAME,) if tiny else (models.GPT2_NAME, models.LLAMA_NAME):
        base = _base(name, tiny)
        batch, length = (2, 16) if tiny else (4, 1024)
        title = f"Compiled training step, {name}, batch {batch} x {length}"
        torch.compiler.reset()
        made = _of(COMPILED, base, batch, length, "aot_eager" if tiny else "inductor")
        race(record, title, made, 0.2 if tiny else 5, needs=1 if tiny else 30, limit=110)
        base = made = None
        free()


def _decoders(base: Any, ids: Tensor, new: int, cache: str) -> dict[str, Callable[[], Run]]:
    """Return what makes each decoder; PEFT's prefix works with the dynamic cache alone."""
    return {
        label: lambda make=make: decoding(make(base), ids, new, cache)
        for label, make in DECODED.items()
        if cache == "dynamic" or label != "prefix 20, PEFT"
    }


def _base(name: str, tiny: bool) -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return models.base(name, tiny, device, torch.float32 if tiny else torch.bfloat16)


def _of(
    makes: dict[str, models.Make], base: Any, batch: int, length: int, compile_it: str = ""
) -> dict[str, Callable[[], Run]]:
    ids = models.tokens(base, batch, length)
    return {
        label: lambda make=make: training(make(base), ids, compile_it)
        for label, make in makes.items()
    }
