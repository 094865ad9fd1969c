"""The page of a model: whole, small, without network; its search and views work in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery.testing import make_model
from tests.support.models import build

VOID = {"meta", "link", "input", "path", "rect"}


class Page(HTMLParser):
    """Checks that tags close, and collects ids, links, labels and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def every(self, name: str) -> list[str]:
        return [value for _, attrs in self.seen if (value := attrs.get(name)) is not None]


def deep(layers: int = 12) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=layers, n_embd=24, n_head=2, vocab_size=50, n_positions=32,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("methods", [None, "lora", "prompt"])
@pytest.mark.parametrize("shape", ["fused", "encoder_decoder"])
def test_a_page_is_whole_and_has_every_site(shape: str, methods: str | None) -> None:
    model = make_model(shape)
    text = surgery.anatomy(model, methods).html()
    page = Page(text)
    for site in [*surgery.locate(model), *surgery.locate(model).norm]:
        assert site.path in page.text or site.path.rpartition(".")[2] in page.text
    ids, names = page.every("id"), page.every("for")
    assert len(ids) == len(set(ids))
    assert set(names) <= set(ids)
    assert {link[1:] for link in page.every("href") if link.startswith("#")} <= set(ids)
    assert all(attrs.get("aria-label") for tag, attrs in page.seen if tag == "svg")
    assert ("spliced in" in page.text) == (methods is not None)


def test_a_page_needs_no_network() -> None:
    text = surgery.anatomy(make_model("grouped"), "lora").html()
    assert "http" not in text
    assert not re.search(r"@import|url\(|<script[^>]+src|<link[^>]+stylesheet", text)
    drawing = surgery.anatomy(make_model("grouped")).svg("model.layers.0.mlp")
    assert re.findall(r"http[^\"]*", drawing) == ["http://www.w3.org/2000/svg"]


def test_layers_that_read_the_same_are_drawn_once() -> None:
    model = deep()
    few, many = (surgery.anatomy(deep(n), "lora").html() for n in (2, 12))
    assert len(many.encode()) < 100_000
    assert len(many) - len(few) < 4_000
    assert many.count("<svg") == few.count("<svg")
    page = Page(many)
    assert "layers 1 to 11 read the same" in page.text
    assert all(site.path in page.text for site in surgery.locate(model))


def test_a_layer_that_differs_is_drawn_itself() -> None:
    model = deep(3)
    surgery.splice(model, surgery.method("lora"), at=surgery.locate(model).layers(1, 2))
    page = Page(surgery.anatomy(model).html())
    headings = [text for text in ("h.0", "h.1", "h.2") if f"transformer.{text}attn" in page.text]
    assert headings == ["h.0", "h.1"]
    assert "layer 2 reads the same" in page.text


def test_names_are_text() -> None:
    class Evil(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("<script>alert(1)</script>", build("gpt2"))

        def forward(self, input_ids: torch.Tensor) -> object:
            return next(self.children())(input_ids=input_ids).logits

    given = {"input_ids": torch.arange(6)[None]}
    text = surgery.anatomy(Evil(), example_inputs=given).html()
    assert text.count("<script") == 1
    assert "&lt;script&gt;alert(1)" in text


def browser() -> str:
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    if not any(found):
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    return next(filter(None, found))


PROBE = """
<script>
const report = {};
const shown = (all) => [...document.querySelectorAll(all)].filter((e) => !e.hidden).length;
const type = (text) => { find.value = text; find.dispatchEvent(new Event("input")); };
report.places = shown(".place");
type("h.7.mlp"); report.one = [found.textContent, shown(".place"), shown(".alike li")];
type("lora_query"); report.code = [shown(".place"), document.querySelector(".place").hidden];
type("nothing like it"); report.none = [found.textContent, shown(".layer")];
type(""); report.again = [found.textContent, shown(".place"), shown(".layer")];
document.getElementById("all").click();
report.open = document.querySelectorAll(".place[open]").length;
const visible = (all) => [...document.querySelectorAll(all)].filter((e) => e.offsetParent).length;
report.after = [visible(".pane0"), visible(".pane1")];
document.querySelector(".v0").click();
report.before = [visible(".pane0"), visible(".pane1")];
report.wide = document.documentElement.scrollWidth <= window.innerWidth;
const inside = [...document.querySelectorAll(".picture")].filter((e) => e.offsetParent);
report.cut = inside.filter((e) => e.scrollWidth > e.clientWidth + 1).length;
document.body.dataset.report = JSON.stringify(report);
</script></body>
"""


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_search_and_views_work_in_a_browser(tmp_path: Path, dark: bool) -> None:
    program = browser()
    text = surgery.anatomy(deep(), ["lora", "prefix"]).html()
    page = tmp_path / "page.html"
    page.write_text(text.replace("</body>", PROBE), encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --dump-dom "
        "--disable-background-networking --disable-component-update --disable-sync "
        "--enable-logging=stderr --window-size=1200,900"
    ).split()
    flags += [f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run(
        [program, *flags, page.as_uri()], capture_output=True, text=True, timeout=120,
        env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'data-report="([^"]*)"', done.stdout)
    assert found is not None, done.stderr[-2000:]
    report = json.loads(found.group(1).replace("&quot;", '"'))
    assert report == {
        "places": 2,
        "one": ["1 of 24", 0, 1],
        "code": [1, False],
        "none": ["0 of 24", 0],
        "again": ["", 2, 2],
        "open": 2,
        "after": [0, 1],
        "before": [1, 0],
        "wide": True,
        "cut": 0,
    }
