"""Tiny models, and the weights behind each port as views (in, out) of the base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)

D, H = 16, 4
SIZES = {"vocab_size": 30, "bos_token_id": 0, "eos_token_id": 2, "initializer_range": 0.3}
WIDTHS = {"hidden_size": D, "intermediate_size": 24, "num_attention_heads": H}
IDS = torch.arange(10).reshape(2, 5) * 7 % 27 + 3
Parts = tuple[Tensor, Tensor]  # views of a weight (in, out) and a bias (out,) of the base


def gpt2(**options: Any) -> PreTrainedModel:
    shape = {"n_positions": 8, "n_embd": D, "n_layer": 2, "n_head": H}
    return GPT2LMHeadModel(GPT2Config(**shape, **{**SIZES, **options})).eval()


def llama(**options: Any) -> PreTrainedModel:
    shape = {"num_hidden_layers": 2, "num_key_value_heads": 2}
    biases = {"attention_bias": True, "mlp_bias": True}
    return LlamaForCausalLM(LlamaConfig(**WIDTHS, **SIZES, **shape, **biases, **options)).eval()


def roberta(**options: Any) -> PreTrainedModel:
    shape = {"num_hidden_layers": 2, "pad_token_id": 1}
    return RobertaModel(RobertaConfig(**WIDTHS, **SIZES, **shape, **options)).eval()


def neox(**options: Any) -> PreTrainedModel:
    shape = {"num_hidden_layers": 2, "max_position_embeddings": 8}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**WIDTHS, **SIZES, **shape, **options)).eval()


def linear(module: nn.Module) -> Parts:
    return module.weight.data.T, module.bias.data


def gpt2_parts(model: nn.Module, layer: int) -> dict[str, list[Parts]]:
    block = model.transformer.h[layer]
    fused = block.attn.c_attn.weight.data, block.attn.c_attn.bias.data
    parts = {n: [tuple(x[..., i * D : (i + 1) * D] for x in fused)] for i, n in enumerate(QKV)}
    output = [(m.weight.data, m.bias.data) for m in (block.attn.c_proj, block.mlp.c_proj)]
    up = [(block.mlp.c_fc.weight.data, block.mlp.c_fc.bias.data)]
    return {**parts, "output": output, "up": up}


def llama_parts(model: nn.Module, layer: int) -> dict[str, list[Parts]]:
    block = model.model.layers[layer]
    attn, mlp = block.self_attn, block.mlp
    own = (attn.q_proj, attn.k_proj, attn.v_proj)
    parts = {n: [linear(p)] for n, p in zip(QKV, own, strict=True)}
    output = [linear(attn.o_proj), linear(mlp.down_proj)]
    return {**parts, "output": output, "up": [linear(mlp.up_proj)], "gate": [linear(mlp.gate_proj)]}


def roberta_parts(model: nn.Module, layer: int) -> dict[str, list[Parts]]:
    block = model.encoder.layer[layer]
    parts = {n: [linear(getattr(block.attention.self, n))] for n in QKV}
    output = [linear(block.attention.output.dense), linear(block.output.dense)]
    return {**parts, "output": output, "up": [linear(block.intermediate.dense)]}


def neox_parts(model: nn.Module, layer: int) -> dict[str, list[Parts]]:
    """Head h has columns [q_h k_h v_h] of the fused projection, d of each."""
    block = model.gpt_neox.layers[layer]
    fused = [x.unflatten(-1, (H, 3, D // H)) for x in linear(block.attention.query_key_value)]
    parts = {n: [tuple(x[..., i, :] for x in fused)] for i, n in enumerate(QKV)}
    output = [linear(block.attention.dense), linear(block.mlp.dense_4h_to_h)]
    return {**parts, "output": output, "up": [linear(block.mlp.dense_h_to_4h)]}


QKV = ("query", "key", "value")
MODELS: dict[str, tuple[Callable[..., PreTrainedModel], Callable[..., dict[str, list[Parts]]]]] = {
    "gpt2": (gpt2, gpt2_parts),
    "llama": (llama, llama_parts),
    "roberta": (roberta, roberta_parts),
    "neox": (neox, neox_parts),
}
