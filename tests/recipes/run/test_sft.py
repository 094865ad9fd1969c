"""Recipes with TRL's SFTTrainer: packed rows, answers alone in the loss, bases in four bits."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr

import surgery
from surgery.errors import RecipeError
from surgery_recipes.recipe_files import Recipe, find_recipe, read_recipe
from surgery_recipes.run import finetune
from surgery_recipes.run.build import load_base, planned_methods, splice
from surgery_recipes.run.prepare import prepare_run
from surgery_recipes.run.trainer import make_trainer, training_arguments
from tests.recipes import tiny
from tests.recipes.run.runs import QUIET, recipe, stop_at, tensors
from tests.support.models import build

STEPS = ["training.max_steps=4", "training.logging_steps=1", "training.report_to=none"]
STEPS += ["training.disable_tqdm=true", "training.max_length=96", "device=cpu"]
STEPS += ["training.per_device_train_batch_size=2", "training.warmup_steps=0"]
STEPS += ["data.max_length=90", "data.max_new_tokens=4", "data.chat_template=chatml", "limit={}"]
pytestmark = pytest.mark.filterwarnings("ignore")


def talks(folder: Path) -> Path:
    rows = []
    for i in range(20):
        asked = {"role": "user", "content": f"What follows {i}?"}
        rows.append(
            {"messages": [asked, {"role": "assistant", "content": f"{i + 1}" * (1 + i % 3)}]}
        )
    (folder / "talks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "talks.jsonl"


@pytest.fixture
def decoder(root: Path, tmp_path: Path) -> Path:
    """A tiny Llama with a byte tokenizer."""
    model, _ = tiny.prepared("webnlg", root)
    folder = tmp_path / "llama"
    tokenizer = tr.AutoTokenizer.from_pretrained(model)
    made = build("llama")
    made.resize_token_embeddings(len(tokenizer))
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def made(name: str, decoder: Path, tmp_path: Path, *more: str) -> Recipe:
    given = [f"model={decoder}", f"data={talks(tmp_path)}", f"output={tmp_path / 'run'}"]
    return read_recipe(find_recipe(name), [*given, *STEPS, *more])


@pytest.mark.cases
@pytest.mark.parametrize("name", ["chat", "chat_qlora"])
def test_a_chat_recipe_trains_and_scores_the_same_again(
    name: str, decoder: Path, tmp_path: Path
) -> None:
    rows = finetune.train(made(name, decoder, tmp_path), QUIET)
    assert set(rows[0].scores) == {"chrf", "word_f1"}
    assert len(rows[0].losses) == 4
    saved = tensors(tmp_path / "run")
    assert {t.dtype for n, t in saved.items() if "lora" in n} == {torch.float32}
    assert finetune.evaluate(tmp_path / "run", QUIET) == rows[0].scores


def trainer_of(wanted: Recipe) -> tuple[Any, Any]:
    prepared = prepare_run(wanted)
    arguments = training_arguments(wanted)
    model = load_base(prepared, 0)
    splice(model, prepared, planned_methods(wanted))
    return make_trainer(model, prepared, arguments), prepared


@pytest.mark.cases
def test_a_packed_row_has_the_loss_of_its_examples_alone(decoder: Path, tmp_path: Path) -> None:
    """No token sees another example's, also behind what is spliced in."""
    methods = "splice=[{method: lora, rank: 4}, {method: inducer, key_rank: 2, value_rank: 2}]"
    trainer, prepared = trainer_of(made("chat", decoder, tmp_path, methods))
    model = trainer.model.eval()
    with torch.no_grad():
        for _, parameter in surgery.spliced_parameters(model):
            parameter.copy_(0.3 * torch.randn(parameter.shape))
        packed = list(trainer.train_dataset)
        assert len(packed) < len(prepared.features["train"])
        assert max(len(row["input_ids"]) for row in packed) <= 96
        total = count = 0.0
        for features in prepared.features["train"]:
            n = sum(y != -100 for y in features["labels"])
            ids, labels = (torch.tensor([features[k]]) for k in ("input_ids", "labels"))
            total += n * float(model(input_ids=ids, labels=labels).loss)
            count += n
        batch = trainer.data_collator(packed)
        assert int((batch["labels"] != -100).sum()) == count
        loss = trainer.compute_loss(model, dict(batch))
    assert float(loss) == pytest.approx(total / count, rel=1e-4)


@pytest.mark.cases
def test_a_resumed_run_ends_in_the_adapter_of_an_unbroken_one(
    decoder: Path, tmp_path: Path
) -> None:
    saving = ["training.save_strategy=steps", "training.save_steps=2"]
    wanted = made("chat", decoder, tmp_path, *saving)
    finetune.train(wanted, QUIET)
    whole = tensors(tmp_path / "run")
    broken = made("chat", decoder, tmp_path, *saving, f"output={tmp_path / 'broken'}")
    stop_at(3, broken)
    finetune.train(broken, QUIET, finetune.RunOptions(resume=True))
    parts = tensors(tmp_path / "broken")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.cases
@pytest.mark.parametrize(
    ("more", "part"),
    [
        ("training.pakcing=true", r"trl.SFTConfig has no 'pakcing'. Did you mean 'packing'"),
        ("training.max_length=20", "tokens, but rows of training.max_length=20. Raise that"),
        ("training.max_length=null", "Set that, too, such as 1024"),
        ("trainer=dpo", "trainer='dpo' must be sft"),
    ],
)
def test_a_mistake_is_named_before_anything_is_written(
    more: str, part: str, decoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=part):
        finetune.train(made("chat", decoder, tmp_path, more), QUIET)
    assert not (tmp_path / "run").exists()


@pytest.mark.cases
@pytest.mark.parametrize(("name", "what"), [("sst2/lora", "classes"), ("webnlg/lora", "segments")])
def test_a_task_that_is_no_plain_text_is_refused(
    name: str, what: str, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=f"has {what}, and TRL's SFTTrainer learns plain texts"):
        finetune.train(recipe(name, root, tmp_path / "run", "trainer=sft"), QUIET)


def test_without_trl_the_error_says_what_to_install(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(RecipeError, match=r"pip install 'surgery\[chat\]'"):
        finetune.train(made("chat", decoder, tmp_path), QUIET)
