"""Make the models that are compared: known shapes, random weights, with ours or PEFT's in them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers as tr
from torch import Tensor

import surgery
from benchmarks.timing import sharing

Make = Callable[[Any], Any]
RANK = 16
LLAMA = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
}  # fmt: skip
TINY_LLAMA = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
TINY_GPT2 = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA_NAME, GPT2_NAME = "Llama-3.2-1B's shape", "GPT-2 small"


def base(name: str, tiny: bool, device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return a model of a known shape with random weights.

    Args:
        name: ``LLAMA_NAME`` or ``GPT2_NAME``.
        tiny: two small layers instead.
    """
    torch.manual_seed(0)
    with torch.device(device):
        if name == LLAMA_NAME:
            sizes: dict[str, Any] = TINY_LLAMA if tiny else LLAMA
            config = tr.LlamaConfig(**sizes, max_position_embeddings=8192, **SPECIAL)
            model: Any = tr.LlamaForCausalLM(config)
        else:
            sizes = {**(TINY_GPT2 if tiny else {}), "n_positions": 2048}
            model = tr.GPT2LMHeadModel(tr.GPT2Config(**sizes, **SPECIAL))
    return model.to(dtype).eval()


def tokens(model: Any, batch: int, length: int) -> Tensor:
    """Return random token ids."""
    drawn = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (batch, length), generator=drawn)
    return ids.to(model.device)


def frozen(model: Any) -> Any:
    """The base itself; the gradient flows to its embeddings and no weight has one."""
    model = sharing(model)
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return model


def merged(model: Any) -> Any:
    """LoRA folded into the weights of a copy."""
    model = copy.deepcopy(model)
    surgery.splice(model, surgery.method("lora", rank=RANK, ports=("all",)))
    surgery.merge(model)
    return model


def ours(name: str, **options: Any) -> Make:
    """Return what splices a method into a model."""

    def make(model: Any) -> Any:
        model = sharing(model)
        surgery.splice(model, surgery.method(name, **options))
        surgery.freeze_base(model, fresh=False)
        return model

    return make


lora = ours("lora", rank=RANK, alpha=2 * RANK, ports=("all",))  # every linear layer of every block


def peft_lora(model: Any) -> Any:
    """PEFT's LoRA on every linear layer of every block."""
    gpt2 = isinstance(model, tr.GPT2LMHeadModel)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", fan_in_fan_out=gpt2,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return wrapped(model, config)


def peft_prefix(length: int) -> Make:
    """Return what makes of a model PEFT's prefix-tuning."""

    def make(model: Any) -> Any:  # PEFT writes the model's shape into the config: one for each
        config = peft.PrefixTuningConfig(num_virtual_tokens=length, task_type="CAUSAL_LM")
        return wrapped(model, config)

    return make


def wrapped(model: Any, config: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings that PEFT raises
        return peft.get_peft_model(sharing(model), config)
