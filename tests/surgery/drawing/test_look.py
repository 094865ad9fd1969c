"""Looking at a model: what is shown of it, what is refused, and that it stays what it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import surgery
from surgery.testing import make_model

IDS = torch.arange(12).reshape(2, 6)


def test_a_method_is_shown_and_not_kept() -> None:
    model = make_model("fused")
    names, base = set(model.state_dict()), model(input_ids=IDS).logits
    draws = torch.get_rng_state()
    seen = surgery.anatomy(model, "lora")
    assert repr(seen) == "Anatomy of GPT2LMHeadModel: 4 sites, 2 hosts edited"
    assert set(model.state_dict()) == names
    assert surgery.summary(model).reports == ()
    assert torch.equal(torch.get_rng_state(), draws)
    assert torch.equal(model(input_ids=IDS).logits, base)


def test_a_spliced_model_is_shown_and_keeps_its_splice() -> None:
    model = make_model("grouped")
    surgery.splice(model, "lora", name="mine")
    base = model(input_ids=IDS).logits
    text = surgery.diff(model)
    assert "self.mine_lora_query" in text
    both = surgery.diff(model, "ffn_adapter")
    assert "self.ffn_adapter_output" in both
    assert [r.name for r in surgery.summary(model).reports] == ["mine"]
    assert torch.equal(model(input_ids=IDS).logits, base)


def test_a_diff_is_unified_and_tells_alike_hosts_once() -> None:
    text = surgery.diff(make_model("encoder"), "ffn_adapter")
    assert text.startswith(
        "--- roberta.encoder.layer.0 before\n+++ roberta.encoder.layer.0 after\n@@ "
    )
    new = [line for line in text.splitlines() if line.startswith("+ ")]
    assert [line.split("  # ")[0] for line in new] == [
        "+    ffn_adapter_output = self.ffn_adapter_output(input)",
        "+    output = add(output, ffn_adapter_output)",
    ]
    assert text.splitlines()[-1] == "the same at roberta.encoder.layer.1"
    one = surgery.diff(make_model("encoder"), "ffn_adapter", site="roberta.encoder.layer.1")
    assert "layer.0" not in one


def test_edits_around_a_call_are_named() -> None:
    text = surgery.diff(make_model("fused"), "prompt")
    assert "prompt_call wraps the call of transformer\n" in text
    assert "Only its call is edited" in surgery.anatomy(make_model("fused"), "prompt").html()


def test_what_cannot_be_shown_is_refused(tmp_path: Path) -> None:
    model = make_model("fused")
    with pytest.raises(surgery.SpliceError, match="nothing is spliced into this GPT2LMHeadModel"):
        surgery.diff(model)
    seen = surgery.anatomy(model)
    with pytest.raises(surgery.SpliceError, match="nothing is spliced"):
        seen.diff()
    with pytest.raises(surgery.SiteError, match=r"Did you mean 'transformer\.h\.0\.attn'"):
        seen.svg("transformer.h.0.atn")
    with pytest.raises(surgery.StoreError, match="there is no folder"):
        seen.save(tmp_path / "none" / "page.html")


def test_a_page_is_saved_and_framed_in_a_notebook(tmp_path: Path) -> None:
    seen = surgery.anatomy(make_model("vision"))
    path = seen.save(tmp_path / "page.html")
    assert path.read_text(encoding="utf-8") == seen.html()
    frame = seen._repr_html_()
    assert frame.startswith("<iframe title=")
    assert "<script" not in frame


def test_a_plain_model_is_shown() -> None:
    model = torch.nn.Sequential(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    seen = surgery.anatomy(model.eval(), "lora", example_inputs=torch.randn(1, 4, 16))
    assert "self.lora_query" in seen.diff()
