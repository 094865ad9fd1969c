"""The commonest jobs in one call: what they splice, what they freeze, what they leave."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from torch import nn

import surgery
from tests.support.models import NAMES, build, inputs
from tests.support.splices import untouched


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def inserted(model: nn.Module) -> set[str]:
    return {name for name, _ in surgery.spliced_parameters(model)}


@pytest.mark.parametrize("name", NAMES)
def test_all_linear_is_every_projection_of_attention_and_ffn(name: str) -> None:
    model = build(name)
    report = surgery.lora(model, rank=2, alpha=4, example_inputs=inputs(name))
    sites = surgery.locate(build(name), inputs(name))
    wanted = {
        (site.path, port)
        for site in sites
        for port in ("query", "key", "value", "output", "up", "gate")
        if port in site.ports
    }
    assert {(i.site.path, i.edit.port) for i in report.inserted} == wanted
    assert trained(model) == inserted(model)
    assert report.methods[0] == surgery.method("lora", rank=2, alpha=4, ports=("all",))


@pytest.mark.parametrize(
    ("targets", "ports"),
    [("attention", {"query", "key", "value", "output"}), (("query", "up"), {"query", "up"})],
)
def test_targets_are_ports(targets: Any, ports: set[str]) -> None:
    model = build("llama")
    report = surgery.lora(model, targets=targets, keep=["lm_head"])
    assert {i.edit.port for i in report.inserted} == ports
    assert trained(model) == inserted(model) | {"lm_head.weight"}


def test_sites_and_names_are_passed_on() -> None:
    model = build("gpt2")
    sites = surgery.locate(model).attention[:1]
    surgery.lora(model, at=sites, targets=("query",), name="first")
    report = surgery.prefix(model, length=3, at=sites, name="second")
    assert report.methods[0] == surgery.method("prefix", length=3)
    assert len(report.inserted) == 1
    assert [r.name for r in surgery.summary(model).reports] == ["first", "second"]


@pytest.mark.parametrize("job", ["lora", "prefix", "inducer"])
def test_defaults_are_those_of_the_method(job: str) -> None:
    report = getattr(surgery, job)(build("gpt2"))
    made, default = report.methods[0], surgery.method(job)
    changed = {"ports"} if job == "lora" else set()
    for field in dataclasses.fields(default):
        same = getattr(made, field.name) == getattr(default, field.name)
        assert same or field.name in changed, field.name


@pytest.mark.parametrize(
    "options", [{"targets": "everything"}, {"keep": ["no_such_part"]}, {"rank": 0}, {"odd": 1}]
)
def test_what_is_refused_leaves_the_model_as_it_was(options: dict[str, Any]) -> None:
    model = build("gpt2")
    with pytest.raises(surgery.SurgeryError):
        surgery.lora(model, **options)
    assert untouched(model)
    assert trained(model) == {name for name, _ in model.named_parameters()}
