"""Results in a notebook: tables in which names are text, whatever they hold."""

from __future__ import annotations

from html.parser import HTMLParser

import torch
from torch import nn

import surgery
from tests.support.models import build


class Cells(HTMLParser):
    """Collects tags and the text of cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def test_sites_report_and_summary_are_tables() -> None:
    model = build("gpt2")
    sites = surgery.locate(model)
    shown = Cells(sites._repr_html_())
    assert [row[0] for row in shown.rows] == ["site", *(site.path for site in sites)]
    report = surgery.lora(model, rank=2)
    rows = Cells(report._repr_html_()).rows
    assert [row[:2] for row in rows[1:]] == [[i.path, str(i.parameters)] for i in report.inserted]
    assert rows[1][2] == "add at query reading query.source"
    assert rows[1][2] in repr(report)
    one = Cells(sites[0]._repr_html_())
    assert [row[0] for row in one.rows] == ["port", *sites[0].ports]
    assert sites[0].path in sites[0]._repr_html_()
    counts = surgery.summary(model)
    text = counts._repr_html_()
    assert f"{counts.trainable:,} of {counts.total:,}" in text
    assert counts.line in text
    assert Cells(text).rows[1][:2] == ["default", counts.states["default"]]


def test_names_are_escaped() -> None:
    class Evil(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("<script>alert(1)</script>", build("gpt2"))

        def forward(self, input_ids: torch.Tensor) -> object:
            return next(self.children())(input_ids=input_ids).logits

    model = Evil()
    given = {"input_ids": torch.arange(6)[None]}
    sites = surgery.locate(model, given)
    report = surgery.splice(model, surgery.method("lora"), at=sites)
    for text in (sites._repr_html_(), report._repr_html_(), surgery.summary(model)._repr_html_()):
        assert "<script>" not in text
        assert "script" not in Cells(text).tags
    assert "&lt;script&gt;" in sites._repr_html_()


def test_the_line_counts_what_is_trained() -> None:
    model = build("gpt2")
    surgery.lora(model, rank=2)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    percent = f"{100 * trained / total:.4f}"
    line = surgery.summary(model).line
    assert line == f"trainable {trained:,} of {total:,} parameters ({percent} %)"
