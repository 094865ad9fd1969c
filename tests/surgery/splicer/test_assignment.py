"""Tests of which sites a method is given."""

from __future__ import annotations

import pytest

import surgery
from surgery.errors import SurgeryError
from tests.support.models import build
from tests.support.splices import untouched


def test_a_method_for_no_site_says_what_there_is() -> None:
    model = build("gpt2")
    with pytest.raises(surgery.SiteError, match=r"'inducer' is for none of these 2 sites \(FFN\)"):
        surgery.splice(model, surgery.method("inducer"), at=surgery.locate(model).ffn)
    assert untouched(model)


def test_sites_of_another_model() -> None:
    with pytest.raises(surgery.SiteError, match="located in another model"):
        surgery.splice(build("gpt2"), surgery.method("lora"), at=surgery.locate(build("llama")))


def test_sites_may_be_a_list_or_a_slice() -> None:
    model = build("gpt2")
    sites = surgery.locate(model).attention
    assert len(surgery.splice(model, surgery.method("lora"), at=sites[:1]).sites) == 1
    report = surgery.splice(model, surgery.method("lora"), at=list(sites)[1:], name="b")
    assert len(report.sites) == len(sites) - 1
    with pytest.raises(SurgeryError, match=r"Take the site from surgery.locate"):
        surgery.splice(model, surgery.method("lora"), at=report.sites, name="c")
