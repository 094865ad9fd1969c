"""The model of a run is handed to lm-evaluation-harness; mistakes are named before it is loaded."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from typer.testing import CliRunner

import surgery
from surgery.cli import app
from surgery.errors import RecipeError
from surgery_recipes.run import evaluate_by_harness, finetune
from tests.recipes.run.runs import QUIET, recipe

TOY = """task: toy
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" yes", " no, never"]
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""
QUESTIONS = [{"question": f"Is {i} more than 3?", "answer": int(i <= 3)} for i in range(6)]


@pytest.fixture
def run(root: Path, tmp_path: Path) -> Path:
    """A finished run of a decoder, whose own data are gone."""
    made = recipe("webnlg/lora", root, tmp_path / "run", "training.max_steps=2")
    finetune.train(made, QUIET)
    return tmp_path / "run"


def toy(folder: Path) -> Path:
    data = folder / "toy.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    (folder / "toy.yaml").write_text(TOY.format(data=data))
    return folder / "toy.yaml"


def by_hand(run: Path, model: Any, tokenizer: Any) -> float:
    """The share of questions whose right answer has the greater log-likelihood."""
    right = 0
    for question in QUESTIONS:
        sums = []
        for choice in (" yes", " no, never"):
            before = tokenizer(question["question"])["input_ids"]
            ids = before + tokenizer(choice)["input_ids"]
            logits = model(input_ids=torch.tensor([ids])).logits.log_softmax(-1)[0]
            places = range(len(before) - 1, len(ids) - 1)
            sums.append(sum(float(logits[i, ids[i + 1]]) for i in places))
        right += sums[int(question["answer"])] > sums[1 - int(question["answer"])]
    return right / len(QUESTIONS)


@pytest.mark.cases
@pytest.mark.filterwarnings("ignore")
def test_a_toy_task_is_asked_of_the_spliced_model(
    run: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    unread = surgery.tasks()["webnlg"]
    monkeypatch.setattr(unread, "splits", lambda self: pytest.fail("the data are not needed"))
    done = CliRunner().invoke(app, ["eval", str(run), "--lm-eval", str(toy(tmp_path))])
    assert done.exit_code == 0, done.output
    assert "acc" in done.output
    kept = json.loads((run / "lm_eval.json").read_text())
    tokenizer = tr.AutoTokenizer.from_pretrained(run / "adapter")
    base = tr.AutoModelForCausalLM.from_pretrained(root / "gpt2")
    base.resize_token_embeddings(len(tokenizer))
    model = surgery.load(base, run / "adapter").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # so that the adapter decides
            if "lora" in name:
                parameter.copy_(torch.randn(parameter.shape))
        surgery.save(model, tmp_path / "changed")
        shutil.rmtree(run / "adapter")
        shutil.copytree(tmp_path / "changed", run / "adapter")
        scores = evaluate_by_harness(run, [str(tmp_path / "toy.yaml")], QUIET)
        assert scores["toy"]["acc,none"] == pytest.approx(by_hand(run, model, tokenizer))
    few = evaluate_by_harness(run, [str(tmp_path / "toy.yaml")], QUIET, limit=2)
    assert few["toy"]["acc,none"] in (0, 0.5, 1)
    assert json.loads((run / "lm_eval.json").read_text())["limit"] == 2
    assert kept["results"]["toy"].keys() >= {"acc,none"}


@pytest.mark.cases
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("tasks", "part"),
    [
        (["nowhere.yaml"], "nowhere.yaml': no such file"),
        (["{toy}/none.yaml"], "no line `task: NAME`"),
        (["arc_eazy"], r"no task 'arc_eazy'. Did you mean 'arc_easy'\?"),
        ([""], "name the tasks, separated by commas"),
    ],
)
def test_a_wrong_task_is_named_before_the_model_is_loaded(
    tasks: list[str], part: str, tmp_path: Path
) -> None:
    (tmp_path / "none.yaml").write_text("group: x\n")
    with pytest.raises(RecipeError, match=part):
        evaluate_by_harness(tmp_path, [t.format(toy=tmp_path) for t in tasks], QUIET)


@pytest.mark.cases
@pytest.mark.filterwarnings("ignore")
def test_a_model_with_classes_is_refused(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    finetune.train(recipe("sst2/lora", root, run, "training.max_steps=2"), QUIET)
    with pytest.raises(RecipeError, match="the classes of task 'sst2', and the harness asks"):
        evaluate_by_harness(run, [str(toy(tmp_path))], QUIET)


def test_a_missing_harness_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RecipeError, match=r"pip install 'surgery\[lm-eval\]'"):
        evaluate_by_harness(tmp_path, ["arc_easy"], QUIET)
    with pytest.raises(RecipeError, match="--limit -1"):
        evaluate_by_harness(tmp_path, ["arc_easy"], QUIET, limit=-1)
