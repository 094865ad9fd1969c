"""Combine methods under one name, with the papers' settings for GPT-2 small as defaults.

    inducer_lora   LoRA on the query projection, then inducer-tuning            2,002,320 parameters
    mam_inducer    the same, and a parallel adapter beside the FFN              2,001,816
    mam_adapter    prefix-tuning, and a scaled parallel adapter beside the FFN

Chen et al. 2022, arXiv:2210.14469, section 5; ``mam_adapter``: He et al. 2022, arXiv:2110.04366.
A preset is a method as any other: at each site it splices its parts, in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import surgery


@dataclass(frozen=True)
class Preset(surgery.Method):
    """A method that is a list of others: a subclass gives ``parts``, in the order to splice."""

    kinds = ("attention", "ffn")

    def __post_init__(self) -> None:
        _ = self.parts  # each part checks its own options

    @property
    def parts(self) -> list[surgery.Method]:
        """The methods that this one combines."""
        return []

    @property
    def start(self) -> surgery.Start:
        starts: list[Any] = [part.start for part in self.parts]
        return next((s for s in ("none", "gated") if s in starts), "exact")

    def suits(self, site: surgery.Site) -> bool:
        return any(part.suits(site) for part in self.parts)

    def splice(self, site: surgery.OpenSite) -> None:
        for part in self.parts:
            if part.suits(site):
                part.splice(site)


@dataclass(frozen=True)
class InducerLoRA(Preset):
    """Update the query projection by LoRA, then add inducers that read the updated query.

    Args:
        key_rank, value_rank, init: as for ``inducer``.
        inducer_dropout: probability, on lambda.
        lora_rank, alpha, dropout, bias: ``rank`` and the other options of ``lora``.

    Start: exact; with ``init="paper"`` none.

    Raises:
        MethodError: a part refuses its option.
    """

    name = "inducer_lora"
    size = ("key_rank", "value_rank", "lora_rank")

    key_rank: int = 5
    value_rank: int = 12
    lora_rank: int = 24
    alpha: float = 32.0
    dropout: float = 0.0
    inducer_dropout: float = 0.0
    bias: bool = True
    init: Literal["zero", "paper"] = "zero"

    @property
    def parts(self) -> list[surgery.Method]:
        return [
            surgery.method(
                "lora", rank=self.lora_rank, alpha=self.alpha, ports=("query",),
                dropout=self.dropout, bias=self.bias,
            ),
            surgery.method(
                "inducer", key_rank=self.key_rank, value_rank=self.value_rank,
                dropout=self.inducer_dropout, init=self.init,
            ),
        ]  # fmt: skip


@dataclass(frozen=True)
class MAMInducer(InducerLoRA):
    """Combine ``inducer_lora`` in attention with a parallel adapter beside the FFN.

    Args:
        ffn_rank, scale, layer_norm: ``rank`` and the other options of ``ffn_adapter``.
        init: as for ``inducer``; ``paper`` also starts the adapter at N(0, 0.02).

    The other options are those of ``inducer_lora``. Start: exact; with ``init="paper"`` none.
    """

    name = "mam_inducer"
    size = (*InducerLoRA.size, "ffn_rank")

    key_rank: int = 3
    value_rank: int = 7
    lora_rank: int = 16
    ffn_rank: int = 42
    scale: float = 1.0
    layer_norm: bool = False

    @property
    def parts(self) -> list[surgery.Method]:
        beside = surgery.method(
            "ffn_adapter", rank=self.ffn_rank, scale=self.scale, layer_norm=self.layer_norm,
            init="zero" if self.init == "zero" else "normal",
        )  # fmt: skip
        return [*super().parts, beside]


@dataclass(frozen=True)
class MAMAdapter(Preset):
    """Combine a short prefix in attention with a scaled parallel adapter beside the FFN.

    Args:
        length: number P of prefix keys and values per layer.
        rank, scale: inner width r and factor s of the adapter.

    He et al. use length 30, rank 512, scale 4 for summarisation (XSum) and 16, 16, 2 for GLUE.
    Start: none, because the prefix takes a share of the softmax.
    """

    name = "mam_adapter"
    size = ("length", "rank")

    length: int = 30
    rank: int = 512
    scale: float = 4.0

    @property
    def parts(self) -> list[surgery.Method]:
        return [
            surgery.method("prefix", length=self.length),
            surgery.method("ffn_adapter", rank=self.rank, scale=self.scale),
        ]


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    for preset in (InducerLoRA, MAMInducer, MAMAdapter):
        register(preset)
