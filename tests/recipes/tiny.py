"""Tiny models of the recipes' architectures, with a byte tokenizer, and a few made-up data."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
import transformers as tr
from tokenizers.pre_tokenizers import ByteLevel

FAMILY = {
    "webnlg": "gpt2", "coqa": "gpt2", "mnli": "roberta", "sst2": "roberta", "digits": "vit",
}  # fmt: skip
FILES = ("vocab.json", "merges.txt")


def save_model(kind: str, folder: Path, tokenizer: Path | None = None) -> Path:
    """A random model of two layers with a tokenizer: of bytes, or the one with those files."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "vit":
        return _save_vit(folder)
    special = (
        ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if kind == "roberta" else ["<|endoftext|>"]
    )
    if tokenizer is None:
        letters = [*special, *sorted(ByteLevel.alphabet())]
        (folder / FILES[0]).write_text(json.dumps({c: i for i, c in enumerate(letters)}))
        (folder / FILES[1]).write_text("#version: 0.2\n")
    else:
        for name in FILES:
            (folder / name).write_bytes((tokenizer / name).read_bytes())
    cls = tr.RobertaTokenizer if kind == "roberta" else tr.GPT2Tokenizer
    made = cls.from_pretrained(folder)
    made.save_pretrained(folder)
    torch.manual_seed(0)
    model: Any
    if kind == "roberta":
        model = tr.RobertaForMaskedLM(
            tr.RobertaConfig(
                vocab_size=len(made), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=64, max_position_embeddings=514, type_vocab_size=1,
                pad_token_id=1, bos_token_id=0, eos_token_id=2,
            )
        )  # fmt: skip
    else:
        end = made.eos_token_id
        model = tr.GPT2LMHeadModel(
            tr.GPT2Config(
                vocab_size=len(made), n_positions=1024, n_embd=32, n_layer=2, n_head=4,
                bos_token_id=end, eos_token_id=end,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    return folder


def _save_vit(folder: Path) -> Path:
    """A random vision transformer of two layers, for grey images of 8 by 8 pixels."""
    torch.manual_seed(0)
    config = tr.ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=64, num_labels=3,
    )  # fmt: skip
    tr.ViTForImageClassification(config).save_pretrained(folder)
    size = {"height": 8, "width": 8}
    tr.ViTImageProcessorPil(image_mean=[0.5], image_std=[0.5], size=size).save_pretrained(folder)
    return folder


def save_data(task: str, folder: Path, count: int = 8) -> Path:
    """A few made-up examples, in the files and format of the official release."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {"webnlg": _webnlg, "coqa": _coqa, "mnli": _mnli, "sst2": _sst2}
    if task in made:  # scikit-learn ships the digits
        made[task](folder, count)
    return folder


def _webnlg(folder: Path, count: int) -> None:
    for split in ("train", "dev", "test"):
        entries = []
        for i in range(count):
            new = split == "test" and i % 2
            triple = {
                "subject": "New_" * i + f"Town_{i}",
                "property": "isIn",
                "object": f'"Land {i}"',
            }
            texts = [f"Town {i} is in land {i}.", f"In land {i} there is town {i}."]
            entry = {
                "category": "Artist" if new else "City",
                "modifiedtripleset": [triple],
                "lexicalisations": [{"lex": text, "comment": "good"} for text in texts],
            }
            entries.append({str(i + 1): entry})
        (folder / f"{split}.json").write_text(json.dumps({"entries": entries}))


def _coqa(folder: Path, count: int) -> None:
    for split in ("train", "dev"):
        stories = []
        for i in range(count):
            questions = [{"input_text": f"What is {k}?", "turn_id": k + 1} for k in range(3)]
            answers = [{"input_text": f"a thing {k}", "turn_id": k + 1} for k in range(3)]
            story = {"source": "mctest", "id": f"{i}", "story": f"Once {i} things were. " * 4}
            story |= {"questions": questions, "answers": answers}
            if split == "dev":
                story["additional_answers"] = {"0": answers, "1": answers, "2": answers}
            stories.append(story)
        (folder / f"coqa-{split}-v1.0.json").write_text(json.dumps({"data": stories}))


def _mnli(folder: Path, count: int) -> None:
    labels = ("entailment", "neutral", "contradiction", "-")
    for split in ("train", "dev_matched", "dev_mismatched"):
        rows = [
            {
                "sentence1": f"It is {i}.",
                "sentence2": f"It is {i + 1}.",
                "gold_label": labels[i % 4],
            }
            for i in range(count)
        ]
        text = "\n".join(map(json.dumps, rows))
        (folder / f"multinli_1.0_{split}.jsonl.gz").write_bytes(gzip.compress(text.encode()))


def _sst2(folder: Path, count: int) -> None:
    for split in ("train", "dev"):
        rows = [f"{'good' if i % 2 else 'bad'} film number {i} \t{i % 2}" for i in range(count)]
        (folder / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")


def prepared(task: str, root: Path) -> tuple[Path, Path]:
    """A model and data for a task, made below ``root`` if they are not there."""
    kind = FAMILY[task]
    model, data = root / kind, root / task
    if not model.is_dir():
        save_model(kind, model)
    if not data.is_dir():
        save_data(task, data)
    return model, data


def overrides(task: str, model: Path, data: Path, output: Path) -> list[str]:
    """What makes a shipped recipe of a task run in a moment."""
    small = ["max_steps=4", "logging_steps=1", "disable_tqdm=true", "report_to=none"]
    small += ["per_device_train_batch_size=2", "warmup_steps=1", "eval_strategy=steps"]
    small += ["save_strategy=steps", "save_steps=2", "eval_steps=2"]
    extra = {
        "webnlg": ["data.ter=false", "data.meteor=false", "data.max_new_tokens=8"],
        "coqa": ["data.max_new_tokens=8", "data.held_out=0.2"],
        "mnli": ["data.validation=3"],
        "sst2": ["data.held_out=2"],
        "digits": ["limit={train: 30, validation: 10, test: 20}"],
    }[task]
    named = [f"model={model}", f"output={output}", "device=cpu"]
    named += [f"data={data}"] if task != "digits" else []
    return [*named, *extra, *(f"training.{text}" for text in small)]
