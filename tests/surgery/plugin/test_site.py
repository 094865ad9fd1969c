"""Tests of ports: unknown names, and what cannot be inserted at one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
from torch import nn

import surgery
from tests.support.custom_methods import Custom, Shift, insert, refused
from tests.support.models import build


def test_unknown_port_names_the_nearest() -> None:
    with pytest.raises(surgery.PortError, match=r"'qeury'. Did you mean 'query'\?"):
        surgery.method("lora", ports=("qeury",))
    site = surgery.locate(build("gpt2"))[0]
    with pytest.raises(surgery.PortError, match=r"no port 'contxt'. Did you mean 'context'\?"):
        site.port("contxt")
    with pytest.raises(surgery.PortError, match=r"no port 'weights' \(.*'eager' shows it\)"):
        site.port("weights")


@pytest.mark.parametrize(
    ("act", "what"),
    [
        (insert(lambda h: h), "is not an nn.Module. Pass an object"),
        (insert(Shift), "is not an nn.Module. Pass an object"),
        (insert(Shift(), "my.mod"), "'my.mod' must be an identifier"),
        (lambda s: s.port("output").add(Shift(), "x", "input"), r"must be a tuple: \('input',\)"),
        (
            lambda s: s.port("output").add(Shift(), "x", ("activation.source",)),
            "read without a suffix",
        ),
        (lambda s: 1 / 0, "method 'custom' fails in its splice.*ZeroDivisionError"),
        (lambda s: s.port("output").insert(s.base().c_fc, "x"), "the module of what is inserted"),
        (lambda s: s.port("output").insert(s.base(), "x"), "is part of the base, and would be"),
        (lambda s: s.port("output").insert(nn.Sequential(s.base().c_fc), "x"), "0 of what is ins"),
    ],
)
def test_what_cannot_be_inserted_is_said_at_once(act: Any, what: str) -> None:
    refused(act, what)


def test_calls_can_only_be_wrapped_and_lse_only_be_read() -> None:
    model = build("gpt2")

    @dataclass(frozen=True)
    class Wrong(Custom):
        kinds = ("block", "attention")

    for port, what in (("call", "only be wrapped"), ("lse", "only be read")):

        def act(site: surgery.Site, port: str = port) -> None:
            if port in site.ports:
                site.port(port).insert(Shift(), "x")
            elif site.kind == "attention":
                site.port("output").insert(Shift(), "x")
            else:
                site.port("call").wrap(Shift(), "x")

        with pytest.raises(surgery.PortError, match=what):
            surgery.splice(model, Wrong(act))

    class Raises(nn.Module):
        def forward(self, forward: Any, **arguments: Any) -> Any:
            raise ZeroDivisionError("mine")

    def wrap(site: surgery.Site) -> None:
        if site.kind == "block":
            site.port("call").wrap(Raises(), "x")
        else:
            site.port("output").insert(nn.Identity(), "y")

    with pytest.raises(surgery.SpliceError, match=r"the forward fails with custom .*Zero.*mine"):
        surgery.splice(model, Wrong(wrap))
    assert not [n for n, _ in model.named_modules() if n.endswith(("x_call", "y_output"))]


@pytest.mark.parametrize("path", ["", "a.b", "very.long.path." * 20])
def test_a_site_is_shown_in_one_line(path: str) -> None:
    sites = surgery.locate(build("gpt2"))
    for site in [*sites, *sites.others]:
        text = repr(dataclasses.replace(site, path=path))
        assert len(text) <= 100
        assert "\n" not in text
        assert text.startswith("<Site ")
        assert site.description in text
    first = "<Site transformer.h.0.attn: causal self-attention, 4 heads of 8, width 32, 12 ports>"
    assert repr(sites[0]) == first
