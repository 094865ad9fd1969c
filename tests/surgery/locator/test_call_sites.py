"""Trunks and stacks: one each for every module that embeds tokens."""

from __future__ import annotations

import pytest
import torch
import transformers as tr

import surgery
from tests.support.models import rename
from tests.zoo.build import build


def calls(sites: surgery.Sites) -> list[tuple[str, str, str, str]]:
    kinds = ("stack", "trunk")
    return [(s.kind, s.path, s.role, s.ids) for s in sites.others if s.kind in kinds]


@pytest.mark.parametrize(("name", "top"), [("t5", ""), ("bart", "model.")])
def test_an_encoder_and_a_decoder_have_a_trunk_each(name: str, top: str) -> None:
    tiny = build(name)
    sites = surgery.locate(tiny.model, tiny.inputs)
    assert calls(sites) == [
        (kind, f"{top}{role}", role, "input_ids")
        for role in ("encoder", "decoder")
        for kind in ("stack", "trunk")
    ]
    memory = {s.role: s.memory for s in sites.others if s.kind == "trunk"}
    assert memory["encoder"] == ()
    assert set(memory["decoder"]) == {"encoder_hidden_states", "encoder_attention_mask"}
    roles = [(kind, role) for kind, _, role, _ in calls(sites)]
    rename(tiny.model)
    renamed = calls(surgery.locate(tiny.model, tiny.inputs))
    assert [(kind, role) for kind, _, role, _ in renamed] == roles


def test_positions_beside_tokens_are_positions() -> None:
    tiny = build("bart")
    sites = surgery.locate(tiny.model, tiny.inputs)
    assert [site.path for site in sites.position] == ["model.decoder.embed_positions"]


def test_a_tower_for_images_is_outside_the_trunk_of_the_text() -> None:
    tiny = build("clip")
    sites = surgery.locate(tiny.model, tiny.inputs)
    assert calls(sites) == [
        ("stack", "text_model.encoder", "", ""),
        ("trunk", "text_model", "", "input_ids"),
    ]
    surgery.splice(tiny.model, surgery.method("prompt", length=3), at=sites)


def test_a_module_that_embeds_at_two_places_has_no_trunk() -> None:
    embeddings = torch.nn.ModuleList([torch.nn.Embedding(60, 32) for _ in range(2)])

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = embeddings
            layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
            self.stack = torch.nn.TransformerEncoder(layer, 1)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.stack(self.tables[0](ids) + self.tables[1](ids))

    ids = torch.arange(14).reshape(2, 7) + 3
    assert not calls(surgery.locate(Twice().eval(), ids))
    with pytest.raises(surgery.SiteError, match="not exactly one module"):
        surgery.splice(Twice().eval(), surgery.method("prompt"), example_inputs=ids)


def test_a_decoder_with_other_queries_is_refused_with_the_shapes() -> None:
    tiny = build("prophetnet")
    method = surgery.method("prompt", length=3, sequence="decoder")
    with pytest.raises(surgery.SpliceError, match="would become"):
        surgery.splice(tiny.model, method, example_inputs=tiny.inputs)
    assert isinstance(tiny.model, tr.ProphetNetForConditionalGeneration)
