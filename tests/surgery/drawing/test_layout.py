"""Boxes of a drawing do not overlap, edges lead down, and each box is reached."""

from __future__ import annotations

from itertools import combinations
from xml.etree import ElementTree

import pytest

import surgery
from surgery.drawing.host_graphs import host_graphs
from surgery.drawing.layout import HIGH, ROW, laid_out
from surgery.drawing.listing import Listing
from surgery.drawing.svg import svg
from surgery.testing import make_model


def listing(shape: str, *methods: str) -> Listing:
    model = make_model(shape)
    if methods:
        surgery.splice(model, methods)
    found = host_graphs(model, surgery.locate(model)[0])
    return found.after or found.before


@pytest.mark.parametrize("methods", [(), ("lora", "prefix")], ids=["base", "spliced"])
@pytest.mark.parametrize("shape", ["fused", "grouped", "encoder", "eager"])
def test_no_box_overlaps_another_and_edges_lead_down(shape: str, methods: tuple[str, ...]) -> None:
    placed = laid_out(listing(shape, *methods))
    assert HIGH < ROW
    for a, b in combinations(placed.boxes, 2):
        if a.row == b.row:
            assert abs(a.x - b.x) >= (a.width + b.width) / 2
    for box in placed.boxes:
        assert box.x - box.width / 2 >= -1e-6
        assert box.x + box.width / 2 <= placed.width + 1e-6
    for way in placed.edges:
        assert [box.row for box in way] == list(range(way[0].row, way[-1].row + 1))
    joined = {id(box) for way in placed.edges for box in (way[0], way[-1])}
    assert joined == {id(box) for box in placed.boxes}


def test_every_port_and_every_inserted_module_is_in_the_drawing() -> None:
    drawn = listing("grouped", "lora", "ffn_adapter")
    root = ElementTree.fromstring(svg(drawn, "a & b", alone=True))
    space = "{http://www.w3.org/2000/svg}"
    assert root.get("aria-label") == "a & b"
    texts = " ".join(text.text or "" for text in root.iter(f"{space}text"))
    for step in drawn.steps:
        assert all(port in texts for port in step.ports if step.drawn)
    assert "lora_query" in texts
    new = [g for g in root.iter(f"{space}g") if "new" in (g.get("class") or "").split()]
    assert len(new) >= 2


def test_a_drawing_is_the_same_each_time() -> None:
    assert svg(listing("fused", "lora"), "x") == svg(listing("fused", "lora"), "x")
