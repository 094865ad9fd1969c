"""PEFT's adapters on five tiny architectures, moved off their start."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers as tr
from torch import Tensor

from tests.support.models import IDS, VOCABULARY, build

TASKS = {
    "gpt2": "CAUSAL_LM",
    "llama": "CAUSAL_LM",
    "mixtral": "CAUSAL_LM",
    "roberta": "SEQ_CLS",
    "t5": "SEQ_2_SEQ_LM",
}
QV = {"gpt2": ["c_attn"], "roberta": ["query", "value"], "t5": ["q", "v"]}
EMBEDDING = {
    "gpt2": "wte",
    "llama": "embed_tokens",
    "mixtral": "embed_tokens",
    "roberta": "word_embeddings",
}
TOKENS = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(5))


def base(name: str) -> Any:
    """A tiny random base, the same at each call."""
    if name in ("gpt2", "llama", "roberta"):
        return build(name)
    torch.manual_seed(0)
    if name == "t5":
        config = tr.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
            decoder_start_token_id=0, **IDS,
        )  # fmt: skip
        return tr.T5ForConditionalGeneration(config).eval()
    config = tr.MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, **IDS,
    )  # fmt: skip
    return tr.MixtralForCausalLM(config).eval()


def bart(layers: int, encoder_layers: int | None = None) -> Any:
    """A tiny encoder-decoder that numbers its tokens."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = tr.BartConfig(
        vocab_size=VOCABULARY, encoder_layers=encoder_layers or layers, decoder_layers=layers,
        max_position_embeddings=64, **sizes, **heads, **IDS,
    )  # fmt: skip
    return tr.BartForConditionalGeneration(config).eval()


def lora(**options: Any) -> Callable[[str], Any]:
    def config(name: str) -> Any:
        own = {"target_modules": QV.get(name, ["q_proj", "v_proj"]), **options}
        if name == "mixtral" and own["target_modules"] == "all-linear":  # its experts are 3-D
            own["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
        return peft.LoraConfig(task_type=TASKS[name], **own)

    return config


def table(cls: Any, **options: Any) -> Callable[[str], Any]:
    return lambda name: cls(task_type=TASKS[name], num_virtual_tokens=3, **options)


PATTERNS = {"rank_pattern": {r"0.*": 2}, "alpha_pattern": {r".*1.*": 3}}
CONFIGS: dict[str, Callable[[str], Any]] = {
    "lora": lora(),
    "lora_everywhere": lora(target_modules="all-linear", bias="all", lora_bias=True),
    "lora_patterns": lora(target_modules="all-linear", r=4, **PATTERNS),
    "lora_rs": lora(r=4, lora_alpha=7, use_rslora=True, bias="lora_only"),
    "dora": lora(target_modules="all-linear", r=4, use_dora=True, bias="all", **PATTERNS),
    "lora_rows": lora(trainable_token_indices=[1, 5]),
    "lora_embedding": lambda name: lora(
        target_modules=[*QV.get(name, ["q_proj", "v_proj"]), EMBEDDING[name]], lora_dropout=0.1
    )(name),
    "ia3": lambda name: peft.IA3Config(task_type=TASKS[name]),
    "prefix": table(peft.PrefixTuningConfig),
    "prefix_mlp": table(peft.PrefixTuningConfig, prefix_projection=True, encoder_hidden_size=16),
    "prompt": table(peft.PromptTuningConfig),
    "ptuning": table(peft.PromptEncoderConfig, encoder_hidden_size=16),
}


def adapted(name: str, config: Any) -> Any:
    """A PeftModel whose trained parameters are moved off their start."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        model = peft.get_peft_model(base(name), config).eval()
    move(model)
    return model


def move(model: Any) -> None:
    """Add noise to all that is trained."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def scores(model: Any, name: str) -> Tensor:
    """The logits of a model, at the places of the tokens alone where it is a decoder."""
    given = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    if name == "t5":
        given["decoder_input_ids"] = TOKENS[:, :4]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: Tensor = model(**given).logits
    return found[:, -TOKENS.shape[1] :] if found.dim() == 3 else found


def reloaded(name: str, folder: Any) -> Any:
    """What PEFT makes of a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base(name), str(folder)).eval()
