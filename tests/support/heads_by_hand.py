"""Tiny models whose queries, keys and values are computed by hand, and rotated."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)

D, H = 16, 4
SIZES = {"vocab_size": 30, "bos_token_id": 0, "eos_token_id": 2}
WIDTHS = {"hidden_size": D, "intermediate_size": 24, "num_attention_heads": H}


def fill(shape: tuple[int, ...], a: float) -> Tensor:
    numbers = a + 0.7 * torch.arange(math.prod(shape), dtype=torch.float64)
    return numbers.sin().reshape(shape)


def close(a: Tensor, b: Any, atol: float = 1e-9) -> None:
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=0, atol=atol)


def turn(x: Tensor, position: int) -> Tensor:
    """Rotary encoding of a head (d,): (x_c, x_{c+d/2}) turned by position * 10000^(-2c/d)."""
    half = x.shape[0] // 2
    angle = position * 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[:half], x[half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])


def gpt2(**options: Any) -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(n_positions=16, n_embd=D, n_layer=1, n_head=H, **SIZES, **options)
    )


def roberta(**options: Any) -> PreTrainedModel:
    config = RobertaConfig(**WIDTHS, **SIZES, num_hidden_layers=1, pad_token_id=1, **options)
    return RobertaModel(config)


def llama(**options: Any) -> PreTrainedModel:
    config = LlamaConfig(**WIDTHS, **SIZES, num_hidden_layers=1, num_key_value_heads=2, **options)
    return LlamaForCausalLM(config)


def split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, D // H)).transpose(1, 2)


def projections(attn: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Any]:
    """q, k, v split into heads, Wo (H d, D) and bo, from the weights of a layer."""
    if hasattr(attn, "c_attn"):
        qkv = x @ attn.c_attn.weight + attn.c_attn.bias
        q, k, v = map(split, qkv.chunk(3, -1))
        return q, k, v, attn.c_proj.weight, attn.c_proj.bias
    if hasattr(attn, "q_proj"):
        q, k, v = (split(x @ p.weight.T) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        return q, k, v, attn.o_proj.weight.T, 0.0
    own = attn.self
    q, k, v = (split(x @ p.weight.T + p.bias) for p in (own.query, own.key, own.value))
    return q, k, v, attn.output.dense.weight.T, attn.output.dense.bias


IDS = torch.arange(10).reshape(2, 5) * 7 % 27 + 3
PADDED = {"no": [1, 1, 1, 1, 1], "right": [1, 1, 1, 0, 0], "left": [0, 0, 1, 1, 1]}
