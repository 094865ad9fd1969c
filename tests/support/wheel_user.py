"""A user's first script: it runs outside the repository, with what a wheel has installed.

python wheel_user.py FOLDER    FOLDER: the environment that surgery must come from
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import surgery
import surgery_recipes

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a the film is good bad very not . , and it of to".split()
library: Any = transformers


def life() -> None:
    """Splice a tiny GPT-2 with random weights, train a step, save, remove, load."""
    torch.manual_seed(0)
    config = library.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=64)
    model = library.GPT2LMHeadModel(config).eval()
    ids = torch.arange(12).reshape(2, 6)
    base = model(input_ids=ids).logits.detach()
    surgery.splice(model, surgery.method("inducer", key_rank=2, value_rank=2), name="inducer")
    surgery.splice(model, surgery.method("lora", rank=2), name="lora")
    assert torch.equal(model(input_ids=ids).logits, base)
    surgery.freeze_base(model)
    optimizer = torch.optim.SGD(surgery.parameter_groups(model, lr=0.5))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    tuned = model(input_ids=ids).logits
    assert not torch.equal(tuned, base)
    surgery.save(model, "adapter")
    surgery.remove(model)
    assert torch.equal(model(input_ids=ids).logits, base)
    assert torch.equal(surgery.load(model, "adapter")(input_ids=ids).logits, tuned)


def encoder() -> None:
    """Write a tiny encoder with a tokenizer of a few words, for the quickstart."""
    folder = Path("encoder")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = library.BertConfig(num_attention_heads=4, vocab_size=len(WORDS), **sizes)
    library.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    library.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)


if __name__ == "__main__":
    home = Path(sys.argv[1]).resolve()
    for package in (surgery, surgery_recipes):
        assert package.__file__ is not None
        assert Path(package.__file__).resolve().is_relative_to(home), package.__file__
    life()
    encoder()
