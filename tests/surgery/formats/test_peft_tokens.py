"""PEFT's rows of tokens are an adapter's own, as in PEFT; what does not switch is refused."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import surgery
from tests.support.peft_cases import QV, TASKS, TOKENS, adapted, base, move, reloaded, scores
from tests.support.splices import untouched

FIRST, SECOND, THIRD = (int(i) for i in TOKENS[0].unique()[[4, 0, 2]])  # in no order
TABLE = {"gpt2": "transformer.wte", "llama": "model.embed_tokens", "roberta": "roberta"}
ROWS = "token_adapter.trainable_tokens_delta"


def config(name: str, tokens: Any = (FIRST, SECOND), **options: Any) -> Any:
    indices = [*tokens] if isinstance(tokens, tuple) else tokens
    given = {"target_modules": QV.get(name, ["q_proj"]), "trainable_token_indices": indices}
    return peft.LoraConfig(task_type=TASKS[name], r=2, **{**given, **options})


def quietly(action: Any, *given: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        return action(*given, **options)


def two(name: str, **options: Any) -> tuple[Any, dict[str | None, Tensor]]:
    """A PeftModel of two adapters that share a token, "a" active; and the scores of each."""
    theirs = adapted(name, config(name, **options))
    theirs.add_adapter("b", config(name, (SECOND, THIRD), **options))
    theirs.set_adapter("b")
    move(theirs)
    expected: dict[str | None, Tensor] = {}
    for adapter in ("b", "default"):
        theirs.set_adapter(adapter)
        expected[adapter] = scores(theirs, name)
    with theirs.disable_adapter():
        expected[None] = scores(theirs, name)
    return theirs, expected


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def switches(model: Any, name: str, expected: dict[str | None, Tensor]) -> None:
    """Assert that a model switches, routes and loses two adapters as PEFT's does."""
    for adapter in ("default", "b"):
        surgery.use(model, adapter)
        close(scores(model, name), expected[adapter])
    with surgery.disabled(model):
        assert torch.equal(scores(model, name), expected[None])
    surgery.use(model)
    with surgery.route(["b", None]):
        routed = scores(model, name)
    close(routed, torch.stack([expected["b"][0], expected[None][1]]))
    surgery.use(model, "default")
    surgery.remove(model, "b")
    close(scores(model, name), expected["default"])
    surgery.remove(model)
    state, before = model.state_dict(), base(name).state_dict()
    assert untouched(model)
    assert state.keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in state.items())
    assert torch.equal(scores(model, name), expected[None])


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])  # a tied head, none, two readers
def test_two_adapters_of_a_peft_model_switch(name: str) -> None:
    theirs, expected = two(name)
    for one, other in (("default", "b"), ("default", None), ("b", None)):
        assert not torch.allclose(expected[one], expected[other], atol=1e-3)
    model = surgery.from_peft(theirs)
    close(scores(model, name), expected["default"])  # which was active, and is not the last
    switches(model, name, expected)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_two_folders_of_peft_switch_and_go_back_as_they_came(name: str, tmp_path: Path) -> None:
    theirs, expected = two(name)
    quietly(theirs.save_pretrained, tmp_path)
    model = base(name)
    surgery.load(model, tmp_path)
    surgery.load(model, tmp_path / "b", name="b")
    for adapter, came in (("default", tmp_path), ("b", tmp_path / "b")):
        surgery.save(model, tmp_path / "ours" / adapter, only=adapter, format="peft")
        close(scores(reloaded(name, tmp_path / "ours" / adapter), name), expected[adapter])
        here, there = (
            load_file(path / "adapter_model.safetensors")
            for path in (tmp_path / "ours" / adapter, came)
        )
        (key,) = [key for key in there if ROWS in key]
        numbers = json.loads((came / "adapter_config.json").read_text())["trainable_token_indices"]
        there[key] = there[key][sorted(range(len(numbers)), key=numbers.__getitem__)]
        assert here.keys() == there.keys()
        for each, tensor in here.items():
            torch.testing.assert_close(tensor, there[each], rtol=0, atol=1e-6)
    switches(model, name, expected)


def test_the_own_format_restore_and_hotswap_take_it(tmp_path: Path) -> None:
    _, expected = two("gpt2")
    theirs, _ = two("gpt2")
    quietly(theirs.save_pretrained, tmp_path)
    model = surgery.load(base("gpt2"), tmp_path)
    surgery.save(model, tmp_path / "own")
    again = surgery.load(base("gpt2"), tmp_path / "own")
    assert torch.equal(scores(again, "gpt2"), scores(model, "gpt2"))
    close(scores(again, "gpt2"), expected["default"])
    for write in (
        lambda: surgery.restore(again, tmp_path / "own"),
        lambda: surgery.hotswap(again, "default", tmp_path / "own"),
    ):
        with torch.no_grad():
            for _, parameter in surgery.spliced_parameters(again):
                parameter.zero_()
        close(scores(again, "gpt2"), expected[None])
        write()
        assert torch.equal(scores(again, "gpt2"), scores(model, "gpt2"))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_lora_with_tokens_that_was_trained_here_goes_to_peft(name: str, tmp_path: Path) -> None:
    """Rows that were trained in the base beside it are in its file, too."""
    model = base(name)
    tokens = surgery.method("tokens", tokens=(FIRST, SECOND))
    surgery.splice(model, [surgery.method("lora", rank=2, fused=True), tokens])
    surgery.freeze_base(model)
    move(model)
    for rows in ([], [SECOND, THIRD]):
        if rows:
            surgery.train_rows(model, f"{TABLE[name]}.weight", rows)
            with torch.no_grad():
                model.get_parameter(f"{TABLE[name]}.weight")[rows] += 0.5
        expected = scores(model, name)
        surgery.save(model, tmp_path / str(len(rows)), format="peft")
        close(scores(reloaded(name, tmp_path / str(len(rows))), name), expected)
        close(scores(surgery.load(base(name), tmp_path / str(len(rows))), name), expected)


def test_a_tie_that_peft_would_not_follow_is_refused(tmp_path: Path) -> None:
    model = base("gpt2")
    tokens = surgery.method("tokens", tokens=(FIRST,))
    surgery.splice(model, [surgery.method("lora", rank=2), tokens])
    model.config.tie_word_embeddings = False
    with pytest.raises(surgery.SpliceError, match=r"in one of transformer.wte, lm_head alone"):
        surgery.save(model, tmp_path / "new", format="peft")
    model.config.tie_word_embeddings = True
    surgery.freeze_base(model, keep=["transformer.wte"])
    with pytest.raises(surgery.SpliceError, match=r"holds transformer.wte.weight whole or rows"):
        surgery.save(model, tmp_path / "new", format="peft")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_base_in_half_precision(name: str, tmp_path: Path) -> None:
    """Rows in bfloat16 differ from PEFT's by two roundings: of D = R - E, and of E + D."""
    theirs = quietly(peft.get_peft_model, base(name).bfloat16(), config(name)).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "trainable_tokens" in key:
                parameter.add_(torch.randn_like(parameter)).copy_(parameter.bfloat16())
    expected = scores(theirs, name)
    quietly(theirs.save_pretrained, tmp_path)
    model = surgery.load(base(name).bfloat16(), tmp_path)
    table, ids = model.get_submodule(TABLE[name]), torch.tensor([FIRST, SECOND, THIRD])
    rows = theirs.get_input_embeddings()(ids)
    assert not torch.equal(rows, table.weight[ids])
    atol = 2.0**-9 * table.weight[ids].abs().max().item()
    torch.testing.assert_close(table(ids), rows, rtol=2.0**-8, atol=atol)
    torch.testing.assert_close(scores(model, name), expected, rtol=2e-2, atol=2e-2)


def test_rows_of_positions_stay_rows_of_the_base_and_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = adapted("gpt2", config("gpt2", {"wte": [FIRST], "wpe": [1, 2]}))
    expected = scores(theirs, "gpt2")
    quietly(theirs.save_pretrained, tmp_path)
    with caplog.at_level(logging.WARNING, logger="surgery"):
        model = surgery.load(base("gpt2"), tmp_path)
    assert "replaces 2 rows of transformer.wpe.weight" in caplog.text
    assert "wte" not in caplog.text
    close(scores(model, "gpt2"), expected)
    surgery.save(model, tmp_path / "ours", format="peft")
    close(scores(reloaded("gpt2", tmp_path / "ours"), "gpt2"), expected)


def test_rows_that_peft_changes_in_one_of_several_modules_are_refused() -> None:
    for tokens, match in (
        ({"lm_head": [FIRST]}, "rows of lm_head, and PEFT changes those of that module alone"),
        ({"wte": [FIRST], "lm_head": [SECOND]}, "same table|one table"),
    ):
        theirs = adapted("gpt2", config("gpt2", tokens))
        expected = scores(theirs, "gpt2")
        with pytest.raises(surgery.StoreError, match=match):
            surgery.from_peft(theirs)
        assert torch.equal(scores(theirs, "gpt2"), expected)
    theirs = adapted("gpt2", config("gpt2", {"wte": [FIRST], "lm_head": [FIRST]}))
    expected = scores(theirs, "gpt2")
    close(scores(surgery.from_peft(theirs), "gpt2"), expected)


def test_a_whole_embedding_is_taken_where_keep_names_it() -> None:
    options = {"modules_to_save": ["embed_tokens"], "trainable_token_indices": None}
    theirs = adapted("llama", config("llama", **options))
    expected = scores(theirs, "llama")
    with pytest.raises(surgery.StoreError, match=r"pass keep=\['model.embed_tokens.weight'\]"):
        surgery.from_peft(theirs)
    assert torch.equal(scores(theirs, "llama"), expected)
    close(scores(surgery.from_peft(theirs, keep=["model.embed_tokens"]), "llama"), expected)


@pytest.mark.parametrize("module", ["norm", "embed_tokens"])
def test_what_does_not_switch_is_refused_beside_another_adapter(module: str) -> None:
    options = {"modules_to_save": [module], "trainable_token_indices": None}
    theirs = adapted("llama", config("llama", **options))
    quietly(theirs.add_adapter, "b", config("llama", trainable_token_indices=None))
    expected = scores(theirs, "llama")
    with pytest.raises(surgery.StoreError, match=r"'default'.*no method switches.*2 adapters"):
        surgery.from_peft(theirs, keep=["model.embed_tokens"])
    assert torch.equal(scores(theirs, "llama"), expected)
    theirs.delete_adapter("b")
    theirs.set_adapter("default")
    close(scores(surgery.from_peft(theirs, keep=["model.embed_tokens"]), "llama"), expected)


def test_a_whole_table_that_peft_unties_is_refused(tmp_path: Path) -> None:
    options = {"modules_to_save": ["wte"], "trainable_token_indices": None}
    theirs = adapted("gpt2", config("gpt2", **options))
    expected = scores(theirs, "gpt2")
    with pytest.raises(surgery.StoreError, match=r"untied transformer.wte.weight from lm_head"):
        surgery.from_peft(theirs, keep=["transformer.wte"])
    assert torch.equal(scores(theirs, "gpt2"), expected)

    model = base("gpt2")  # ours is written to each module, so it stays tied
    surgery.splice(model, surgery.method("lora", rank=2))
    surgery.freeze_base(model, keep=["transformer.wte"])
    move(model)
    expected = scores(model, "gpt2")
    surgery.save(model, tmp_path, format="peft")
    close(scores(reloaded("gpt2", tmp_path), "gpt2"), expected)
    again = surgery.load(base("gpt2"), tmp_path, keep=["transformer.wte"])
    close(scores(again, "gpt2"), expected)
