"""Tiny models with methods spliced in."""

from __future__ import annotations

from typing import Any

from torch import nn

import surgery
from tests.support.models import build, inputs, perturb


def built_with(kind: str, *methods: Any, **options: Any) -> Any:
    model = build(kind)
    surgery.splice(model, list(methods), **options)
    perturb(model)
    return model


Named = tuple[str, dict[str, Any]]


def methods(*named: Named) -> list[surgery.Method]:
    return [surgery.method(name, **options) for name, options in named]


def inducer_and_lora() -> list[surgery.Method]:
    return [
        surgery.method("inducer", key_rank=3, value_rank=2),
        surgery.method("lora", rank=2, ports=("query", "key", "value", "output")),
        surgery.method("lora", rank=2, ports=("up", "output")),
    ]


def with_inducer_and_lora(name: str, implementation: str = "sdpa") -> Any:
    model = build(name)
    if name != "plain":
        model.set_attn_implementation(implementation)
    surgery.splice(model, inducer_and_lora(), example_inputs=inputs(name))
    return model


def untouched(model: nn.Module) -> bool:
    return not any("surgery" in key for module in model.modules() for key in vars(module))


THREE_METHODS = [
    surgery.method("inducer", key_rank=2, value_rank=2),
    surgery.method("lora", rank=2, ports=("query", "value", "output")),
    surgery.method("lora", rank=2, ports=("up", "output")),
]


def with_three_methods(model: Any, name: str) -> Any:
    surgery.splice(model, THREE_METHODS, example_inputs=inputs(name))
    perturb(model)
    return model
