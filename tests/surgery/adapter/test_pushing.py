"""Adapters on the Hugging Face hub, which a local server stands in for, up to the bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file

import surgery
from tests.support.models import build, inputs, logits
from tests.support.splices import built_with
from tests.support.stand_in import Web, serve


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """A hub of this machine, with an empty cache, and a working folder without files."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with serve() as web:
        here = web.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": web.url, "HUGGINGFACE_CO_URL_TEMPLATE": here, "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": False,
        }.items():  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        # What transformers keeps has the address of the last test's server.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        monkeypatch.setenv("HF_TOKEN", web.token)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield web


def adapted(seed: int = 0) -> Any:
    model = built_with("gpt2", surgery.method("lora", rank=2), surgery.method("prefix", length=2))
    with torch.no_grad():
        for _, parameter in surgery.spliced_parameters(model):
            parameter.add_(seed)
    return model


def test_an_adapter_is_pushed_and_loaded_byte_for_byte(web: Web, tmp_path: Path) -> None:
    model = adapted()
    address = surgery.push(model, "user/adapter")
    assert address.startswith(f"{web.url}/user/adapter/commit/")
    there = web.repositories["user/adapter"]
    saved = surgery.save(model, tmp_path / "saved")
    for file in saved.iterdir():
        assert there[file.name] == file.read_bytes()
    assert set(there) == {*(f.name for f in saved.iterdir()), "README.md"}  # and no base
    again = surgery.load(build("gpt2"), "user/adapter")
    assert torch.equal(logits(again, inputs("gpt2")), logits(model, inputs("gpt2")))
    asked = list(web.asked)
    surgery.load(build("gpt2"), "user/adapter")  # from the cache: no file is sent again
    assert not [line for line in web.asked[len(asked) :] if line.startswith("GET /user")]


def test_an_adapter_of_peft_is_loaded_from_the_hub(web: Web, tmp_path: Path) -> None:
    model = built_with("gpt2", surgery.method("lora", rank=2))
    surgery.save(model, tmp_path / "peft", format="peft")
    web.repositories["user/peft"] = {f.name: f.read_bytes() for f in (tmp_path / "peft").iterdir()}
    again = surgery.load(build("gpt2"), "user/peft")
    torch.testing.assert_close(logits(again, inputs("gpt2")), logits(model, inputs("gpt2")))


def test_a_pickle_of_peft_is_taken_where_there_is_no_safetensors(web: Web, tmp_path: Path) -> None:
    model = built_with("gpt2", surgery.method("lora", rank=2))
    folder = surgery.save(model, tmp_path / "peft", format="peft")
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    files = {f.name: f.read_bytes() for f in folder.iterdir()}
    web.repositories["user/both"] = dict(files)
    del files["adapter_model.safetensors"]
    web.repositories["user/peft"] = files
    again = surgery.load(build("gpt2"), "user/peft")
    torch.testing.assert_close(logits(again, inputs("gpt2")), logits(model, inputs("gpt2")))
    surgery.load(build("gpt2"), "user/both")
    assert not [line for line in web.asked if "both" in line and line.endswith(".bin")]
    del files["adapter_model.bin"]
    web.repositories["user/none"] = files
    with pytest.raises(surgery.StoreError, match=r"adapter_model.safetensors cannot be downloaded"):
        surgery.load(build("gpt2"), "user/none")


def test_without_a_network_the_cache_serves(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    surgery.push(model, "user/adapter")
    surgery.load(build("gpt2"), "user/adapter")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = surgery.load(build("gpt2"), "user/adapter")
    assert torch.equal(logits(again, inputs("gpt2")), logits(model, inputs("gpt2")))


def test_a_second_push_replaces_the_tensors(web: Web) -> None:
    surgery.push(adapted(), "user/adapter")
    surgery.push(adapted(seed=1), "user/adapter")
    tensors = [name for name in web.repositories["user/adapter"] if name.endswith(".safetensors")]
    assert len(tensors) == 1
    assert json.loads(web.repositories["user/adapter"]["surgery.json"])["tensors"] == tensors[0]


def test_adapters_live_side_by_side_in_subfolders(web: Web) -> None:
    models = {"one": adapted(), "two/deep": adapted(seed=1)}
    for subfolder, model in models.items():
        surgery.push(model, "user/several", subfolder=subfolder)
    for subfolder, model in models.items():
        again = surgery.load(build("gpt2"), "user/several", subfolder=subfolder)
        assert torch.equal(logits(again, inputs("gpt2")), logits(model, inputs("gpt2")))
    with pytest.raises(surgery.StoreError, match=r"leads out"):
        surgery.load(build("gpt2"), "user/several", subfolder="../other")


def test_a_revision_is_asked_for(web: Web) -> None:
    surgery.push(adapted(), "user/adapter")
    surgery.load(build("gpt2"), "user/adapter", revision="v1")
    assert "GET /user/adapter/resolve/v1/surgery.json" in web.asked


def test_a_local_folder_wins_over_the_hub(web: Web) -> None:
    surgery.push(adapted(seed=1), "user/adapter")
    model = adapted()
    surgery.save(model, "user/adapter")
    before = list(web.asked)
    again = surgery.load(build("gpt2"), "user/adapter")
    assert web.asked == before
    assert torch.equal(logits(again, inputs("gpt2")), logits(model, inputs("gpt2")))


def test_the_card_says_what_the_adapter_is_and_its_code_runs(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    build("gpt2").save_pretrained(tmp_path / "base")
    model = adapted()
    model.config._name_or_path = "openai-community/gpt2"
    surgery.push(model, "user/adapter", scores={"accuracy": 0.86, "odd|`name`": 1})
    card = web.repositories["user/adapter"]["README.md"].decode()
    _, metadata, text = card.split("---\n", 2)
    about = yaml.safe_load(metadata)
    assert about["base_model"] == "openai-community/gpt2"
    assert about["library_name"] == "surgery"
    assert {"lora", "prefix"} <= set(about["tags"])
    assert "lora(rank=2" in text
    assert "| `accuracy` | 0.8600 |" in text
    assert "`odd\\|'name'`" in text
    assert f"{surgery.summary(model).stored:,}" in text
    kind = transformers.GPT2LMHeadModel
    loaded = kind.from_pretrained(tmp_path / "base")
    monkeypatch.setattr(kind, "from_pretrained", {"openai-community/gpt2": loaded}.get)
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], names)
    assert torch.equal(logits(names["model"].eval(), inputs("gpt2")), logits(model, inputs("gpt2")))


def test_a_saved_folder_is_pushed_without_what_else_lies_there(web: Web, tmp_path: Path) -> None:
    folder = surgery.save(adapted(), tmp_path / "saved")
    for name in ("model.safetensors", "optimizer.pt", "tokenizer.json", "secrets.env"):
        (folder / name).write_bytes(b"{}")
    surgery.push(folder, "adapter")  # a name of one's own
    there = set(web.repositories["me/adapter"])
    assert {"surgery.json", "tokenizer.json", "README.md"} < there
    assert not there & {"model.safetensors", "optimizer.pt", "secrets.env"}


def test_what_is_not_there_or_too_large_is_refused(web: Web) -> None:
    model = build("gpt2")
    with pytest.raises(surgery.StoreError, match=r"no such folder is here, and surgery\.json"):
        surgery.load(model, "user/nothing")
    web.repositories["user/huge"] = {"surgery.json": b" " * (33 << 20)}
    with pytest.raises(surgery.StoreError, match=r"more than the .* Nothing was downloaded"):
        surgery.load(model, "user/huge")
    assert "GET /user/huge/resolve/main/surgery.json" not in web.asked
    surgery.push(adapted(), "user/hostile")
    files = web.repositories["user/hostile"]
    files["surgery.json"] = files["surgery.json"].replace(b'"tensors": "', b'"tensors": "../../')
    with pytest.raises(surgery.StoreError, match=r"tensors is missing, or has a wrong type"):
        surgery.load(model, "user/hostile")
    assert not surgery.summary(model).reports


def test_a_hub_that_refuses_is_an_error_and_the_token_is_not_shown(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(surgery.StoreError, match=r"hf auth login") as caught:
        surgery.push(adapted(), "user/adapter")
    assert "hf_secret" not in str(caught.value)
    with pytest.raises(surgery.SpliceError, match="nothing"):
        surgery.push(build("gpt2"), "user/adapter")
    with pytest.raises(surgery.StoreError, match="no place on the hub"):
        surgery.push(adapted(), "../user/adapter")


def test_save_pretrained_pushes_the_adapter(web: Web, tmp_path: Path) -> None:
    model = adapted()
    surgery.freeze_base(model)
    model.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="user/trained")
    assert "surgery.json" in web.repositories["user/trained"]
    assert "model.safetensors" not in web.repositories["user/trained"]


def test_save_pretrained_hands_its_options_to_the_hub(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    model = adapted()
    surgery.freeze_base(model)
    options: dict[str, Any] = {"repo_id": "user/trained", "revision": "branch"}
    options |= {"token": web.token, "commit_message": "By hand"}
    model.save_pretrained(tmp_path / "out", push_to_hub=True, **options)
    assert "POST /api/models/user/trained/commit/branch" in web.asked
    assert "surgery.json" in web.repositories["user/trained"]


def test_a_model_pushes_itself_as_an_adapter(web: Web) -> None:
    model = adapted()
    surgery.freeze_base(model)
    model.push_to_hub("user/trained")
    assert "model.safetensors" not in web.repositories["user/trained"]
    again = surgery.load(build("gpt2"), "user/trained")
    assert torch.equal(logits(again, inputs("gpt2")), logits(model, inputs("gpt2")))


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints", "end"])
def test_trainer_pushes_whole_adapters(strategy: str, web: Web, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = adapted()
    surgery.freeze_base(model)
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=3, save_steps=1, report_to=[], use_cpu=True,
        push_to_hub=True, hub_model_id="user/run", hub_strategy=strategy, hub_token=web.token,
        disable_tqdm=True, learning_rate=0.01,
    )  # fmt: skip
    ids = torch.arange(14).reshape(2, 7) + 3
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": r, "labels": r} for r in ids])
    trainer.train()
    if strategy == "end":
        trainer.push_to_hub()
    else:
        trainer.push_in_progress.wait_until_done()
    there = web.repositories["user/run"]
    named = json.loads(there["surgery.json"])["tensors"]
    assert named in there
    assert "model.safetensors" not in there
    assert len([*(tmp_path / "run").glob("surgery-*.safetensors")]) == 1
    places = [n.rpartition("/")[0] for n in there if n.endswith("surgery.json")]
    assert {"checkpoint": "last-checkpoint", "all_checkpoints": "checkpoint-1"}.get(
        strategy, ""
    ) in places
    for place in places:
        surgery.load(build("gpt2"), "user/run", subfolder=place)


def test_trainer_pushes_a_model_without_splices_as_before(web: Web, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    surgery.freeze_base(adapted())
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=1, save_steps=1, report_to=[], use_cpu=True,
        push_to_hub=True, hub_model_id="user/run", hub_token=web.token, disable_tqdm=True,
    )  # fmt: skip
    ids = torch.arange(14).reshape(2, 7) + 3
    rows = [{"input_ids": r, "labels": r} for r in ids]
    trainer = Trainer(build("gpt2"), arguments, train_dataset=rows)
    trainer.train()
    trainer.push_in_progress.wait_until_done()
    assert "model.safetensors" in web.repositories["user/run"]
    assert "surgery.json" not in web.repositories["user/run"]
