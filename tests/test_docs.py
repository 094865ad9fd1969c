"""The examples in README.md and CONTRIBUTING.md run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery.plugin.registry import registry
from surgery.testing import check_method
from tests.support.models import build, inputs

ROOT = Path(__file__).parent.parent


def block(file: str) -> str:
    """The first Python example of a document."""
    found = re.search(r"```python\n(.*?)```", (ROOT / file).read_text(), re.DOTALL)
    assert found is not None
    return found.group(1)


def test_the_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("gpt2").save_pretrained(tmp_path / "openai-community/gpt2")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block("README.md"), names)
    assert surgery.summary(names["model"]).inserted > 0
    assert list((tmp_path / "adapter").glob("surgery*"))
    surgery.remove(names["model"])
    names["inputs"] = inputs("gpt2")
    exec(block("docs/reference.md"), names)
    assert [report.name for report in surgery.summary(names["model"]).reports] == ["first"]


def test_the_reference_has_every_public_name() -> None:
    text = (ROOT / "docs/reference.md").read_text()
    missing = [name for name in surgery.__all__ if not re.search(rf"\b{name}\b", text)]
    assert missing == []


def example(kind: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example of CONTRIBUTING that defines a method of this class; the method is offered."""
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    code = next(text for text in examples if f"class {kind}" in text)
    module: Any = types.ModuleType(f"{kind}_example")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(code, vars(module))
    made = getattr(module, kind)
    monkeypatch.setitem(registry()._offered["method"], made.name, (made, "tests"))
    return module


@pytest.mark.slow
def test_the_example_at_the_first_token_keeps_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    contract = check_method(example("FirstToken", monkeypatch).FirstToken())
    assert not contract.refused


@pytest.mark.slow
def test_the_example_with_lse_keeps_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    module = example("AttentionSink", monkeypatch)
    contract = check_method(module.AttentionSink())
    assert not contract.refused
    sink = module.Sink(2)
    merged, lse = torch.randn(1, 3, 8), torch.randn(1, 2, 3)
    with torch.no_grad():
        sink.gate.fill_(1.0)
        sink.score.normal_()
    scores = torch.stack((lse, sink.score[:, None].expand_as(lse)), -1)  # of all keys, of the sink
    share = scores.softmax(-1)[..., 0]  # (B, H, n): what the real keys keep
    expected = merged.unflatten(-1, (2, 4)) * share.transpose(1, 2)[..., None]
    torch.testing.assert_close(sink(merged, lse), expected.flatten(-2))


def test_the_plugin_in_contributing_is_the_one_that_is_tested() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    folder = ROOT / "plugins/examples/surgery-red"
    for file in ("pyproject.toml", "surgery_red.py", "test_red.py"):
        assert (folder / file).read_text().strip() in text
    assert len((folder / "surgery_red.py").read_text().splitlines()) <= 40


@pytest.mark.slow
def test_the_tests_that_need_a_gpu_are_a_tier() -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "tests/surgery"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "tests/surgery/attention/test_kernels.py::" in done.stdout


def test_the_page_on_serving_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gpt2")
    surgery.splice(model, surgery.method("lora", rank=2))
    for name in ("billing", "legal"):
        surgery.save(model, tmp_path / "adapters" / name)
    surgery.remove(model)
    monkeypatch.chdir(tmp_path)
    ids = torch.arange(12).reshape(4, 3)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 2}
    names: dict[str, Any] = {"model": model, "surgery": surgery, "batch_of_four": batch}
    text = (ROOT / "docs/serving.md").read_text()
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(example, names)
    assert (tmp_path / "served/billing/adapter_config.json").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, which PEFT calls
def test_the_page_for_users_of_peft_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("gpt2").save_pretrained(tmp_path / "openai-community/gpt2")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/moving_from_peft.md").read_text()
    names: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(example, names)
    base = build("gpt2").state_dict()
    assert all(torch.equal(x, base[key]) for key, x in names["model"].state_dict().items())
    assert {path.name for path in (tmp_path / "adapter_for_peft").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_no_file_has_marks_of_an_unfinished_merge() -> None:
    root = Path(__file__).parents[1]
    pattern = r"^(<<<<<<<|>>>>>>>) "
    command = ["git", "grep", "-nE", pattern, "--", "."]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert found.stdout == ""


def test_the_page_on_surgery_without_a_plugin_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/surgery_without_a_plugin.md").read_text()
    names: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(example, names)
    for shape in ("fused", "grouped", "encoder"):
        assert len(names["effects"][shape]) == 4  # two attentions, two FFNs
        assert len(names["heads"][shape]) == 8
        assert all(moved > 0 for moved in names["heads"][shape].values())
    assert len(names["features"]) == 2
    assert [r.name for r in surgery.summary(names["model"]).reports] == ["transplant", "ablate"]
