"""Count the operators of spliced models, and the bytes that they save for a backward pass.

Run: python benchmarks/operators.py
Bars, of models of four layers: LoRA on every projection, Llama <= 44 more operators a decoded token
than the base and <= 620 in a training step, GPT-2 <= 48 and <= 520; inducer <= 60 a token; prefix
<= 8 a token and <= 540 a step; saved bytes no more than PEFT's.

An operator is one that does work: views and allocations are not counted. A training step is a
forward with labels and a backward that adds to gradients, GPT-2's with its dropout. A count has no
noise, so tests/whole/test_benchmarks.py holds the same bars.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
from timing import line, show, verdict
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import surgery

IDS = torch.arange(3, 19).view(2, 8)
PROJECTIONS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
# More a decoded token than the base, in a whole training step.
BARS = {
    ("llama", "LoRA on all"): (44, 620),
    ("gpt2", "LoRA on all"): (48, 520),
    ("llama", "inducer"): (60, None),
    ("llama", "prefix 20"): (8, 540),
}
_ALLOCATE = {
    "_unsafe_view", "_reshape_alias", "lift_fresh", "detach", "alias", "empty", "empty_like",
    "empty_strided", "new_empty", "new_empty_strided",
}  # fmt: skip


class Operators(TorchDispatchMode):
    """Counts the operators that do work inside its ``with`` block."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        outputs = function._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in outputs)
        self.count += not view and function._schema.name.split("::")[1] not in _ALLOCATE
        return function(*args, **(kwargs or {}))


def base(name: str) -> Any:
    """Return a model of four layers with random weights."""
    logging.set_verbosity_error()
    torch.manual_seed(0)
    if name == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 4, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
        return GPT2LMHeadModel(GPT2Config(vocab_size=128, **sizes)).eval()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes)).eval()


def spliced(name: str, method: surgery.Method) -> Any:
    model = base(name)
    surgery.splice(model, method)
    surgery.freeze_base(model)
    return model


def adapted(name: str, config: peft.PeftConfig) -> Any:
    return peft.get_peft_model(base(name), config)


def candidates() -> dict[tuple[str, str, str], Callable[[], Any]]:
    """Return what is counted, by model, method and whose it is."""
    found: dict[tuple[str, str, str], Callable[[], Any]] = {}
    for name, targets in PROJECTIONS.items():
        lora = surgery.method("lora", rank=4, ports=("all",), fused=True)
        config = peft.LoraConfig(r=4, target_modules=targets, fan_in_fan_out=name == "gpt2")
        found[name, "LoRA on all", "surgery"] = lambda n=name, m=lora: spliced(n, m)
        found[name, "LoRA on all", "PEFT"] = lambda n=name, c=config: peft.get_peft_model(
            base(n), c
        )
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20)
    found["llama", "prefix 20", "PEFT"] = lambda: adapted("llama", prefix)
    for name, method in {
        "LoRA on query and value": surgery.method("lora", rank=4),
        "prefix 20": surgery.method("prefix", length=20),
        "inducer": surgery.method("inducer"),
    }.items():
        found["llama", name, "surgery"] = lambda m=method: spliced("llama", m)
    return found


def token(model: Any) -> int:
    """Return the operators of a decoded token, after two others."""
    model.eval()
    with torch.no_grad():
        past = model(input_ids=IDS, use_cache=True).past_key_values
        for _ in range(2):
            with Operators() as counted:
                past = model(
                    input_ids=IDS[:, -1:], past_key_values=past, use_cache=True
                ).past_key_values
    return counted.count


def step(model: Any) -> tuple[int, int]:
    """Return the operators of a training step, and the bytes that its forward saves."""
    model.train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, tuple[Tensor, int]] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = (x, storage.nbytes())  # alive, so that no other is there
        return x

    for _ in range(2):
        saved.clear()
        with Operators() as counted, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
            loss.backward()
    return counted.count, sum(size for _, size in saved.values())


def counts() -> dict[tuple[str, str, str], tuple[int, int, int]]:
    """Return operators a token more than the base's, operators a step, and bytes saved."""
    plain = {name: token(base(name)) for name in PROJECTIONS}
    found = {}
    for key, make in candidates().items():
        added = token(make()) - plain[key[0]]
        found[key] = (added, *step(make()))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    found = counts()
    rows = [
        (f"{model}, {what}", whose, f"{added:+d}", str(whole), f"{size:,}")
        for (model, what, whose), (added, whole, size) in found.items()
    ]
    show(
        "Operators, four layers",
        ["", "of", "a token, more than the base", "a training step", "bytes saved"],
        rows,
    )
    for (model, what), bars in BARS.items():
        for value, bar, name in zip(
            found[model, what, "surgery"], bars, ("token", "step"), strict=False
        ):
            if bar is not None:
                line(f"{model}, {what}, a {name}: {value} {verdict(value, bar)}")


if __name__ == "__main__":
    main()
