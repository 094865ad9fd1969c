"""Ask a model for its answer to each example, in batches, and each distinct prompt only once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, distributed, nn

import surgery
from surgery import Example, Features
from surgery_recipes.run.collate import Collator
from surgery_recipes.run.kinds import has_classes


def answers(
    model: nn.Module,
    task: surgery.Task,
    tokenizer: Any,
    examples: Sequence[Example],
    batch_size: int,
    console: Console,
) -> list[Any]:
    """The model's answers, in the order of the examples: a class number or a text for each.

    Equal prompts are answered once. Distributed processes share the work, and each of them returns
    all answers. Batches go from the longest prompts to the shortest, so a run that is going to
    exceed the memory does so in the first batch.
    """
    prompts = [task.prompt(example, tokenizer) for example in examples]
    names = [_name(prompt, i) for i, prompt in enumerate(prompts)]
    distinct = dict(zip(names, prompts, strict=True))
    order = sorted(distinct, key=lambda key: (-len(key), key))
    together = distributed.is_available() and distributed.is_initialized()
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)
    mine = order[rank::world]
    found: dict[tuple[int, ...], Any] = {}
    training = model.training
    model.eval()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    verb = "generating" if task.kind == "decoder" else "answering"
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        bar = progress.add_task(verb, total=len(mine))
        for start in range(0, len(mine), batch_size):
            keys = mine[start : start + batch_size]
            batch = [distinct[key] for key in keys]
            found.update(zip(keys, _answer(model, task, tokenizer, batch), strict=True))
            progress.advance(bar, len(keys))
    model.train(training)
    if together:
        parts: list[Any] = [None] * world
        distributed.all_gather_object(parts, found)
        found = {key: answer for part in parts for key, answer in part.items()}
    return [found[name] for name in names]


def _name(prompt: Features, number: int) -> tuple[int, ...]:
    """What equal prompts share: their tokens. Each image has its own."""
    return tuple(prompt["input_ids"]) if "input_ids" in prompt else (number,)


@torch.no_grad()
def _answer(model: Any, task: surgery.Task, tokenizer: Any, features: list[Features]) -> list[Any]:
    collate = Collator(pad_id(tokenizer), "left" if task.kind == "decoder" else "right")
    batch = {name: tensor.to(model.device) for name, tensor in collate(features).items()}
    if has_classes(task):
        return list(model(**batch).logits.argmax(-1).tolist())  # (B, classes) -> (B,)
    width = batch["input_ids"].shape[1]
    stop = task.stop(tokenizer)
    written: Tensor = model.generate(
        **batch, **task.decoding, eos_token_id=stop, pad_token_id=pad_id(tokenizer), use_cache=True
    )[:, width:]  # (B, new)
    return [_text(row, stop, tokenizer) for row in written.tolist()]


def _text(ids: list[int], stop: Sequence[int], tokenizer: Any) -> str:
    end = next((i for i, token in enumerate(ids) if token in stop), len(ids))
    return " ".join(tokenizer.decode(ids[:end], skip_special_tokens=True).split())


def pad_id(tokenizer: Any) -> int:
    """The padding token, or the end token of a tokenizer without one; the mask hides either.

    0 for an image processor, as images are not padded.
    """
    pad = getattr(tokenizer, "pad_token_id", 0)
    return int(tokenizer.eos_token_id if pad is None else pad)
