"""A second splice of a kind finds the same sites, and modes of the caller do not matter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import surgery
from tests.support.models import build

IDS = torch.arange(14).reshape(2, 7) + 3


@pytest.mark.parametrize("name", ["bitfit", "lora", "ia3", "inducer", "prefix", "ffn_adapter"])
@pytest.mark.few(5)
def test_a_second_adapter_of_a_kind_finds_the_same_sites(name: str) -> None:
    model = build("gpt2")
    first = surgery.splice(model, surgery.method(name), name="a")
    second = surgery.splice(model, surgery.method(name), name="b")
    assert len(first.inserted) == len(second.inserted)
    assert [s.identity for s in first.sites] == [s.identity for s in second.sites]


def test_a_second_adapter_of_plain_linear_layers() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 2))
    x, lora = torch.randn(3, 10), surgery.method("lora", ports=("output",))
    base = model(x)
    for name in "ab":
        surgery.splice(model, lora, at=surgery.locate(model, x).linear, name=name)
    assert torch.equal(model(x), base)


def test_splice_and_load_work_in_inference_mode(tmp_path: Path) -> None:
    with torch.inference_mode():
        model = build("gpt2")  # its parameters are inference tensors
        surgery.splice(model, surgery.method("lora", rank=2))
        for _, parameter in surgery.spliced_parameters(model):
            assert not parameter.is_inference()
            parameter.normal_()
        expected = model(IDS).logits
        surgery.save(model, tmp_path)
        surgery.remove(model)
        assert torch.equal(surgery.load(model, tmp_path)(IDS).logits, expected)
        surgery.merge(model)
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "ssl", "ssb"])
def test_one_list_of_ports_serves_any_architecture(method: str) -> None:
    for name in ("roberta", "llama"):
        named = surgery.method(method, ports=("query", "key", "value", "output", "up", "gate"))
        report = surgery.splice(build(name), named)
        assert {i.site.kind for i in report.inserted} == {"attention", "ffn"}
        assert any(line.endswith(": gate") for line in report.left_out) == (name == "roberta")
        if method != "lora":
            continue
        every = surgery.splice(build(name), surgery.method("lora", ports="all"))
        assert len(every.inserted) == len(report.inserted)
        assert not every.left_out
