"""Errors come before anything has changed, and say what, where, why and what to do next."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.splicer.record import reports
from tests.models import build, inputs, logits, perturb


def untouched(model: nn.Module) -> bool:
    return not any("surgery" in key for module in model.modules() for key in vars(module))


def test_unknown_method_and_option_name_the_nearest() -> None:
    with pytest.raises(surgery.MethodError, match=r"no method 'lroa'. Did you mean 'lora'\?"):
        surgery.method("lroa")
    with pytest.raises(surgery.MethodError, match=r"no option 'rnak'. Did you mean 'rank'\?"):
        surgery.method("lora", rnak=3)


def test_unknown_port_names_the_nearest() -> None:
    with pytest.raises(surgery.PortError, match=r"'qeury'. Did you mean 'query'\?"):
        surgery.method("lora", ports=("qeury",))
    site = surgery.locate(build("gpt2"))[0]
    with pytest.raises(surgery.PortError, match=r"no port 'contxt'. Did you mean 'context'\?"):
        site.port("contxt")
    with pytest.raises(surgery.PortError, match=r"no port 'weights' \(.*'eager' shows it\)"):
        site.port("weights")


@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        ("lora", {"rank": 0}, "rank=0 is not possible"),
        ("lora", {"dropout": 1.0}, "dropout=1.0 is not possible"),
        ("inducer", {"value_rank": 0}, "value_rank=0 is not possible"),
        ("inducer", {"init": "random"}, "'zero' or 'paper'"),
    ],
)
def test_bad_option_values(name: str, options: dict[str, Any], part: str) -> None:
    with pytest.raises(surgery.MethodError, match=part):
        surgery.method(name, **options)


def test_a_name_used_twice() -> None:
    model = build("gpt2")
    surgery.splice(model, surgery.method("lora"))
    with pytest.raises(surgery.SpliceError, match="already spliced under the name 'default'"):
        surgery.splice(model, surgery.method("lora"))
    assert len(reports(model)) == 1


def test_what_is_not_there_cannot_be_removed_disabled_or_frozen() -> None:
    model = build("gpt2")
    for call in (surgery.remove, surgery.freeze_base, lambda m: surgery.save(m, "nowhere")):
        with pytest.raises(surgery.SpliceError, match="nothing is spliced"):
            call(model)
    surgery.splice(model, surgery.method("lora"), name="mine")
    with pytest.raises(surgery.SpliceError, match="Did you mean 'mine'"):
        surgery.remove(model, "mien")
    with pytest.raises(surgery.SpliceError, match="keep='lm_haed'"):
        surgery.freeze_base(model, keep=["lm_haed"])


def test_a_method_for_no_site_says_what_there_is() -> None:
    model = build("gpt2")
    with pytest.raises(surgery.SiteError, match=r"'inducer' is for none of these 2 sites \(FFN\)"):
        surgery.splice(model, surgery.method("inducer"), at=surgery.locate(model).ffn)
    assert untouched(model)


def test_sites_of_another_model() -> None:
    with pytest.raises(surgery.SiteError, match="located in another model"):
        surgery.splice(build("gpt2"), surgery.method("lora"), at=surgery.locate(build("llama")))


class Brancher(nn.Module):
    """Attention whose forward does what a graph cannot hold: it stores a tensor on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        numbers = k.tolist()
        self.seen = len(numbers)
        y = torch.softmax(q @ k.mT * 0.5, -1) @ v
        return self.out(y.transpose(1, 2).flatten(2)) * float(str(numbers[0][0][0][0]))


def test_a_forward_that_cannot_be_captured_names_file_and_line() -> None:
    model = nn.ModuleList([Brancher()])
    model.forward = lambda x: model[0](x)  # type: ignore[method-assign]
    with pytest.raises(surgery.CaptureError, match=r"Brancher at 0.*\n.*test_errors\.py:\d+"):
        surgery.splice(model, surgery.method("lora"), example_inputs=torch.randn(1, 3, 8))
    assert untouched(model)


@dataclass(frozen=True)
class Loud(surgery.Method):
    """Declares an exact start and does not keep it."""

    name = "loud"

    def splice(self, site: surgery.Site) -> None:
        site.port("output").add(nn.Linear(site.width, site.width), "loud", reads=("output",))


@dataclass(frozen=True)
class Idle(surgery.Method):
    """Inserts a parameter that nothing reads."""

    name = "idle"

    def splice(self, site: surgery.Site) -> None:
        class Same(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.ones(2))

            def forward(self, x: Tensor) -> Tensor:
                return x

        site.port("output").insert(Same(), "idle")


@dataclass(frozen=True)
class Nothing(surgery.Method):
    """Does nothing."""

    name = "nothing"

    def splice(self, site: surgery.Site) -> None:
        pass


@pytest.mark.parametrize(
    ("method", "part"),
    [(Loud(), "declares start 'exact'"), (Idle(), "idle_output"), (Nothing(), "inserted nothing")],
)
def test_a_splice_that_is_not_what_it_says_is_undone(method: surgery.Method, part: str) -> None:
    model, case = build("llama"), inputs("llama")
    expected, keys = logits(model, case), list(model.state_dict())
    with pytest.raises(surgery.SpliceError, match=part):
        surgery.splice(model, [surgery.method("lora"), method])
    assert untouched(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model, case), expected)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = build("roberta")
    surgery.splice(model, surgery.method("lora", rank=2))
    perturb(model)
    surgery.freeze_base(model, keep=["classifier"])
    return surgery.save(model, tmp_path / "adapter")


def test_a_base_that_does_not_fit_is_named_with_sites_and_shapes(saved: Path) -> None:
    other = build("roberta", head_width=4)
    with pytest.raises(surgery.StoreError, match="head_width 8 in the adapter, 4 here"):
        surgery.load(other, saved)
    assert untouched(other)
    with pytest.raises(surgery.StoreError, match="no such attention site"):
        surgery.load(build("gpt2"), saved)
    shallow = build("roberta", depth=1)
    with pytest.raises(surgery.StoreError, match=r"layer\.1\.attention: no such"):
        surgery.load(shallow, saved)
    assert untouched(shallow)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "json", "none"])
def test_damaged_files_are_named(saved: Path, damage: str) -> None:
    tensors = next(saved.glob("*.safetensors"))
    data = tensors.read_bytes()
    if damage == "truncate":
        tensors.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        tensors.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "remove":
        tensors.unlink()
    elif damage == "json":
        (saved / "surgery.json").write_text('{"format": 1')
    else:
        (saved / "surgery.json").unlink()
    model = build("roberta")
    with pytest.raises(surgery.StoreError, match=str(saved)):
        surgery.load(model, saved)
    assert untouched(model)


def test_an_interrupted_save_leaves_the_old_one(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = surgery.load(build("roberta"), saved)
    expected = logits(model, inputs("roberta"))
    perturb(model, seed=12)
    for step in (0, 1):
        count = iter(range(9))
        replace = os.replace

        def interrupted(a: Any, b: Any, at: int = step, count: Any = count) -> None:
            if next(count) == at:
                raise KeyboardInterrupt
            replace(a, b)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", interrupted)
            with pytest.raises(KeyboardInterrupt):
                surgery.save(model, saved)
        again = surgery.load(build("roberta"), saved)
        assert torch.equal(logits(again, inputs("roberta")), expected)
    assert not list(saved.glob("*.tmp"))


def test_what_was_trained_beside_is_saved_along(saved: Path) -> None:
    description = json.loads((saved / "surgery.json").read_text())
    assert "classifier.dense.weight" in description["kept"]
    model = surgery.load(build("roberta", seed=0), saved)
    assert not list(saved.glob("*.bin")) + list(saved.glob("*.pkl"))
    assert "trainable" in repr(surgery.summary(model))


def test_a_fresh_head_is_kept_and_said_so(tmp_path: Path) -> None:
    import transformers as tr

    build("bert").save_pretrained(tmp_path)
    model = tr.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    surgery.splice(model, surgery.method("lora"))
    frozen = surgery.freeze_base(model)
    assert "classifier.weight" in frozen.fresh
    assert "no weights were loaded for them" in repr(frozen)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {"classifier.weight", "classifier.bias"} <= trainable
    assert not any("embeddings" in n for n in trainable)
