"""Trainers of other libraries train a spliced model; their checkpoints hold the adapter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import surgery
from tests.support.models import build

pytestmark = [pytest.mark.cases, pytest.mark.filterwarnings("ignore")]
WORDS = ["<pad>", "<bos>", "<eos>", *"abcdefghij"]
SENTENCES = ["a b c d", "b c d e f", "c d e", "f g h i", "h i j", "j i h g f e"]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def spliced(name: str) -> Any:
    torch.manual_seed(0)
    model = build("llama").train()
    surgery.splice(model, surgery.method(name))
    surgery.freeze_base(model)
    return model


def trainer_of(kind: str, model: Any, folder: Path, steps: int) -> Any:
    import trl
    from datasets import Dataset

    options: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": steps, "save_steps": 2, "learning_rate": 0.05,
        "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "gradient_checkpointing": False, "bf16": False, "lr_scheduler_type": "constant",
    }  # fmt: skip
    rows: list[dict[str, str]] = [{"text": text} for text in SENTENCES]
    if kind != "SFT":
        options["max_length"] = 12
        pairs = zip(SENTENCES, SENTENCES[1:] + SENTENCES[:1], strict=True)
        rows = [{"prompt": "a b", "chosen": x, "rejected": y} for x, y in pairs]
    if kind == "DPO":
        options["precompute_ref_log_probs"] = True
    config = getattr(trl, f"{kind}Config")(**options)
    trainer: Any = getattr(trl, f"{kind}Trainer")
    data = Dataset.from_list(rows)
    return trainer(model, args=config, train_dataset=data, processing_class=tokenizer())


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trl_resumes_from_checkpoints_of_the_adapter(kind: str, tmp_path: Path) -> None:
    whole, again = spliced("lora"), spliced("lora")
    trainer = trainer_of(kind, whole, tmp_path / "whole", steps=4)
    if kind == "DPO":
        assert trainer.ref_model is None  # no second base in memory
    trainer.train()
    trainer_of(kind, spliced("lora"), tmp_path / "cut", steps=2).train()
    checkpoint = tmp_path / "cut/checkpoint-2"
    assert not {"model.safetensors", "pytorch_model.bin"} & {f.name for f in checkpoint.iterdir()}
    trainer_of(kind, again, tmp_path / "cut", steps=4).train(resume_from_checkpoint=str(checkpoint))
    learnt = dict(surgery.spliced_parameters(whole))
    assert all(torch.equal(p, learnt[n]) for n, p in surgery.spliced_parameters(again))
    start = dict(surgery.spliced_parameters(spliced("lora")))
    assert not all(torch.equal(p, start[n]) for n, p in learnt.items())
    loaded = surgery.load(build("llama"), tmp_path / "whole/checkpoint-4")
    assert all(torch.equal(p, learnt[n]) for n, p in surgery.spliced_parameters(loaded))


def example(title: str) -> str:
    """The example of a section of docs/trainers.md."""
    text = (Path(__file__).parents[2] / "docs/trainers.md").read_text()
    section = next(s for s in re.split(r"^## ", text, flags=re.MULTILINE) if s.startswith(title))
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]


def names_for(folder: Path) -> dict[str, Any]:
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in torch.arange(56).reshape(8, 7) + 3]
    return {
        "surgery": surgery, "torch": torch, "Trainer": Trainer, "model": spliced("lora"),
        "rows": rows, "folder": str(folder), "loader": DataLoader(rows, batch_size=2),
        "args": TrainingArguments(str(folder), max_steps=3, report_to=[], use_cpu=True),
        "quiet": {"accelerator": "cpu", "logger": False, "enable_progress_bar": False},
    }  # fmt: skip


@pytest.mark.parametrize("title", ["Trainer", "Lightning", "Fabric"])
def test_an_example_trains_and_its_checkpoint_holds_no_base(title: str, tmp_path: Path) -> None:
    names = names_for(tmp_path)
    exec(example(title), names)
    model = names["model"]
    start = dict(surgery.spliced_parameters(spliced("lora")))
    assert not any(torch.equal(p, start[n]) for n, p in surgery.spliced_parameters(model))
    folder = tmp_path / ("checkpoint-3" if title == "Trainer" else "adapter")
    loaded = dict(surgery.spliced_parameters(surgery.load(build("llama"), folder)))
    assert all(torch.equal(p.cpu(), loaded[n]) for n, p in surgery.spliced_parameters(model))
    if title != "Trainer":
        kept = torch.load(tmp_path / "last.ckpt", weights_only=False)
        kept = kept["model"] if title == "Fabric" else kept["state_dict"]
        assert len(kept) == len(start)


def test_weight_decay_of_the_stock_trainer_spares_what_modules_name(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = build("llama")
    surgery.splice(
        model, [surgery.method("inducer", key_rank=2, value_rank=2), surgery.method("ia3")]
    )
    surgery.freeze_base(model)
    told = TrainingArguments(str(tmp_path), weight_decay=0.1, report_to=[], use_cpu=True)
    trainer = Trainer(model, told, train_dataset=[])
    trainer.create_optimizer()
    decayed = {
        id(p) for g in trainer.optimizer.param_groups if g["weight_decay"] for p in g["params"]
    }
    named = [
        module.get_parameter(name)
        for module in model.modules()
        if hasattr(module, "no_weight_decay")
        for name in module.no_weight_decay()
    ]
    assert named
    assert not {id(p) for p in named} & decayed
    plain = Trainer(build("llama"), told, train_dataset=[])
    plain.create_optimizer()
    assert any(group["weight_decay"] and group["params"] for group in plain.optimizer.param_groups)


def test_weight_decay_of_the_stock_trainer_moves_no_other_rows(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model, names = spliced("lora"), names_for(tmp_path)
    surgery.train_rows(model, "model.embed_tokens.weight", [5, 6])
    table = model.model.embed_tokens.weight
    before = table.detach().clone()
    told = TrainingArguments(
        str(tmp_path), max_steps=3, weight_decay=0.5, learning_rate=0.1, report_to=[], use_cpu=True
    )
    Trainer(model, told, train_dataset=names["rows"]).train()
    moved = (table.detach() != before).any(-1).nonzero().flatten().tolist()
    assert moved == [5, 6]


def test_the_example_of_a_loop_trains(tmp_path: Path) -> None:
    names = names_for(tmp_path)
    before = {n: p.detach().clone() for n, p in surgery.spliced_parameters(names["model"])}
    names["batches"] = list(names["loader"])
    names["optimizer"] = torch.optim.AdamW(surgery.parameter_groups(names["model"], lr=1e-2))
    exec(example("A loop of one's own"), names)
    assert names["life"].steps == len(names["batches"])
    assert not any(torch.equal(p, before[n]) for n, p in surgery.spliced_parameters(names["model"]))


def test_lightning_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path: Path) -> None:
    names = names_for(tmp_path)
    exec(example("Lightning"), names)
    lightning, learnt = names["lightning"], []
    for epochs, start in ((2, None), (1, None), (2, tmp_path / "end.ckpt")):
        adapted = names["Adapted"](spliced("lora"))
        end = lightning.pytorch.callbacks.ModelCheckpoint(
            tmp_path, "end", save_on_train_epoch_end=True, enable_version_counter=False
        )
        trainer = lightning.Trainer(
            max_epochs=epochs, callbacks=[end], default_root_dir=tmp_path, **names["quiet"]
        )
        trainer.fit(adapted, names["loader"], ckpt_path=start)
        learnt.append(dict(surgery.spliced_parameters(adapted.model)))
    whole, half, again = learnt
    assert all(torch.equal(p, again[n]) for n, p in whole.items())
    assert not any(torch.equal(p, half[n]) for n, p in whole.items())
