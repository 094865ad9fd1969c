"""Commands about saved adapters: what they show, write and refuse, without tracebacks."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

import surgery
from surgery.cli import app
from tests.support.models import build, inputs, logits, perturb


def run(*words: Any) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(word) for word in words])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    model = build("gpt2")
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(model.config.vocab_size)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    model = GPT2LMHeadModel.from_pretrained(base)
    surgery.lora(model, rank=2)
    perturb(model)
    return surgery.save(model, tmp_path / "run/adapter")


def test_inspect_shows_what_an_adapter_holds(adapter: Path, base: Path) -> None:
    shutil.rmtree(base)  # not needed
    shown = run("inspect", adapter)
    assert shown.exit_code == 0
    found = surgery.inspect(adapter)
    assert f"GPT2LMHeadModel {base}" in " ".join(shown.output.split())
    assert "lora(rank=2" in shown.output
    assert f"{found.numbers:,} numbers" in shown.output
    model = build("gpt2")
    surgery.load(model, adapter)
    assert found.numbers == surgery.summary(model).inserted
    layers = len(surgery.locate(model).attention)
    assert found.splices[0].sites == {"attention": layers, "ffn": layers}


def test_merge_writes_a_model_that_needs_no_surgery(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    done = run("merge", adapter, tmp_path / "merged")
    assert done.exit_code == 0, done.output
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    model = surgery.load(GPT2LMHeadModel.from_pretrained(base), adapter).eval()
    torch.testing.assert_close(
        logits(merged, inputs("gpt2")), logits(model, inputs("gpt2")), rtol=1e-5, atol=1e-5
    )
    assert (tmp_path / "merged/tokenizer.json").exists()
    again = run("merge", adapter, tmp_path / "merged")
    assert again.exit_code == 1
    assert "not an empty folder" in again.output


def test_generate_continues_a_text(adapter: Path, base: Path) -> None:
    done = run("generate", adapter, "w1 w2 w3", "--tokens", 4)
    assert done.exit_code == 0, done.output
    model = surgery.load(GPT2LMHeadModel.from_pretrained(base), adapter).eval()
    ids = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    assert done.stdout == " ".join(f"w{i}" for i in ids[0]) + "\n"


@pytest.fixture
def of_peft(adapter: Path, base: Path, tmp_path: Path) -> Path:
    """The same adapter as PEFT would have saved it."""
    model = surgery.load(GPT2LMHeadModel.from_pretrained(base), adapter)
    return surgery.save(model, tmp_path / "peft", format="peft")


def test_inspect_shows_a_folder_of_peft(of_peft: Path, base: Path) -> None:
    shutil.rmtree(base)  # not needed
    done = run("inspect", of_peft)
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert f"base AutoModelForCausalLM {base}" in text
    assert "LORA(r=2, lora_alpha=" in text
    assert "target_modules=['c_" in text
    found = surgery.inspect(of_peft)
    assert f"holds {found.numbers:,} numbers in {4 * found.numbers:,} bytes" in text
    assert found.splices[0].sites == {"module": 8}  # two layers of four
    assert found.numbers == surgery.summary(surgery.load(build("gpt2"), of_peft)).inserted


@pytest.mark.parametrize("silent", [True, False])
def test_merge_and_generate_take_a_folder_of_peft(
    silent: bool, of_peft: Path, adapter: Path, tmp_path: Path
) -> None:
    if silent:  # about its task; the base's config tells its class
        file = of_peft / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "task_type": None}))
    words = ("w1 w2 w3", "--tokens", 4)
    done = run("generate", of_peft, *words)
    assert done.exit_code == 0, done.output
    assert done.stdout == run("generate", adapter, *words).stdout
    merged = run("merge", of_peft, tmp_path / "merged")
    assert merged.exit_code == 0, merged.output
    assert run("merge", adapter, tmp_path / "own").exit_code == 0
    a, b = (GPT2LMHeadModel.from_pretrained(tmp_path / n).eval() for n in ("merged", "own"))
    case = inputs("gpt2")
    torch.testing.assert_close(logits(a, case), logits(b, case), rtol=1e-5, atol=1e-5)


def test_names_from_files_cannot_move_the_cursor(adapter: Path, of_peft: Path) -> None:
    """Each line of these would be red, or hide the one before."""
    evil = "\x1b[31mevil\r"
    file = adapter / "surgery.json"
    description = json.loads(file.read_text())
    description["base"]["name"] = description["base"]["class"] = evil
    description["versions"] = {evil: evil}
    description["splices"][0]["methods"][0]["name"] = evil
    file.write_text(json.dumps(description))
    config = json.loads((of_peft / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": evil, "peft_version": evil, "target_modules": [evil]}
    (of_peft / "adapter_config.json").write_text(json.dumps(config))
    for folder in (adapter, of_peft):
        for text in (run("inspect", folder).output, run("generate", folder, "w1").output):
            assert "evil" in text
            assert not {"\x1b", "\r"} & {*text}


def test_convert_writes_the_format_of_peft(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[Any, ...]] = []

    def save(model: Any, folder: Path, **options: Any) -> None:
        called.append((surgery.summary(model).inserted, folder, options))

    monkeypatch.setattr(surgery, "save", save)
    done = run("convert", adapter, tmp_path / "out", "--to", "peft")
    assert done.exit_code == 0, done.output
    assert called == [(surgery.inspect(adapter).numbers, tmp_path / "out", {"format": "peft"})]
    assert run("convert", adapter, tmp_path / "out", "--to", "other").exit_code == 2


def test_another_base_is_given_by_name(adapter: Path, base: Path, tmp_path: Path) -> None:
    base.rename(tmp_path / "moved")
    done = run("merge", adapter, tmp_path / "merged")
    assert done.exit_code == 1
    assert "Give --base" in done.output
    done = run("merge", adapter, tmp_path / "merged", "--base", tmp_path / "moved")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("kind", ["os", "AutoConfig", "GPT2Config", "torch.load", "__loader__"])
def test_the_class_of_a_base_is_a_model_of_transformers(kind: str, adapter: Path) -> None:
    file = adapter / "surgery.json"
    description = json.loads(file.read_text())
    description["base"]["class"] = kind
    file.write_text(json.dumps(description))
    done = run("generate", adapter, "b")
    assert done.exit_code == 1
    assert "no model of transformers" in done.output


def test_push_takes_the_scores_of_the_run(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"scores": {"accuracy": 0.5}}, {"scores": {"accuracy": 0.9, "note": "x"}}]
    (adapter.parent / "metrics.json").write_text(json.dumps({"rows": rows}))
    called: dict[str, Any] = {}

    def push(*given: Any, **options: Any) -> str:
        called.update(options, given=given)
        return "https://hub/commit"

    monkeypatch.setattr(surgery, "push", push)
    done = run("push", adapter, "user/name", "--private", "--subfolder", "deep")
    assert "https://hub/commit" in done.output
    assert called["given"] == (adapter, "user/name")
    assert called["scores"] == {"accuracy": 0.9}
    assert (called["private"], called["subfolder"], called["revision"]) == (True, "deep", None)


@pytest.mark.parametrize(
    "words", [["inspect"], ["merge", "OUT"], ["convert", "OUT", "--to", "peft"], ["generate", "a"]]
)
def test_what_is_no_adapter_is_an_error_without_a_traceback(
    words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    rest = [tmp_path / "out" if word == "OUT" else word for word in words[1:]]
    done = run(words[0], tmp_path / "empty", *rest)
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert "no surgery.json here" in done.output


def test_every_command_has_help_and_the_shell_completes() -> None:
    shown = run("--help").output
    commands = re.findall(r"^│ ([a-z]+) {2,}", shown, re.MULTILINE)
    assert {"inspect", "merge", "convert", "generate", "push", "train"} <= set(commands)
    for command in commands:
        assert run(command, "--help").exit_code == 0
    assert run("--version").output.strip() == f"surgery {surgery.__version__}"
    assert "--install-completion" in shown
