"""Pretrain a small GPT-2 from random weights, on the texts of the training sets.

The result is a base for the recipes of WebNLG and CoQA on a machine without the real GPT-2. It
learns the sentences of WebNLG and the documents, questions and answers of CoQA, all from their
training splits, with GPT-2's tokenizer. The model has ``--block`` positions, because later ones
would never be trained.

Run:  python -m surgery_recipes.tools.pretrain_base --data PATH --output bases/small
      surgery train webnlg/inducer model=bases/small data=PATH/webnlg
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import surgery
from surgery import RecipeError


def texts(data: Path) -> list[str]:
    """Every distinct text of the training splits of WebNLG and CoQA."""
    webnlg = surgery.task("webnlg", path=str(data / "webnlg")).splits()["train"]
    coqa = surgery.task("coqa", path=str(data / "coqa")).splits()["train"]
    found: dict[str, None] = dict.fromkeys(str(example["target"]) for example in webnlg)
    for example in coqa:
        found.setdefault(str(example["story"]))
        found.setdefault(f"{example['question']} {example['references'][0]}")
    return list(found)


def blocks(text: list[str], tokenizer: Any, length: int) -> Dataset:
    """Join the texts with end tokens, and cut the result into blocks of one length.

    Raises:
        RecipeError: the texts do not fill one block.
    """
    ids: list[int] = []
    for part in tokenizer(text)["input_ids"]:
        ids += [*part, tokenizer.eos_token_id]
    pieces = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    if not pieces:
        raise RecipeError(
            f"{len(ids)} tokens are not enough for one block of {length}. Give more data or a "
            "smaller --block."
        )
    return Dataset.from_dict({"input_ids": pieces, "labels": pieces})


def pretrain(options: argparse.Namespace) -> None:
    """Train the model, and save it in one folder with its tokenizer."""
    set_seed(options.seed)
    tokenizer = GPT2Tokenizer.from_pretrained(options.tokenizer)
    data = blocks(texts(Path(options.data)), tokenizer, options.block)
    end = tokenizer.eos_token_id
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_embd=options.width, n_layer=options.layers,
            n_head=options.heads, n_positions=options.block, bos_token_id=end, eos_token_id=end,
        )
    )  # fmt: skip
    arguments = TrainingArguments(
        options.output, max_steps=options.steps, per_device_train_batch_size=options.batch,
        learning_rate=options.rate, lr_scheduler_type="cosine", warmup_steps=options.steps // 20,
        weight_decay=0.1, logging_steps=20, save_strategy="no", report_to="none",
        seed=options.seed, bf16=options.bf16, dataloader_pin_memory=False,
        use_cpu=not torch.accelerator.is_available(),
    )  # fmt: skip
    Trainer(model, arguments, default_data_collator, data).train()
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    count = sum(p.numel() for p in model.parameters())
    print(f"{options.output}: {count:,} parameters, {len(data):,} blocks of {options.block} tokens")


def main(words: list[str] | None = None) -> None:
    """Read the command line, or ``words`` in its place."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", default="openai-community/gpt2")
    parser.add_argument("--data", required=True, help="a folder with webnlg/ and coqa/")
    parser.add_argument("--output", default="bases/small")
    for name, value in (("layers", 4), ("width", 256), ("heads", 4), ("block", 512)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("steps", 2000), ("batch", 8), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    pretrain(parser.parse_args(words))


if __name__ == "__main__":
    main()
