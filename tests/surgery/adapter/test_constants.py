"""A constant behind a block folds into the bias that the block adds last; nothing else does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from tests.support.models import build, inputs, logits, perturb


class Constant(nn.Module):
    """``h + c``."""

    needs_bias = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.zeros(width))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.c

    def fold(self, weight: Any, bias: Tensor) -> tuple[Any, Tensor]:
        return weight, bias + self.c.to(bias)


class Stretch(Constant):
    """``h (1 + c)``, with a fold that is right behind a projection alone."""

    def forward(self, h: Tensor) -> Tensor:
        return h * (1 + self.c)

    def fold(self, weight: Any, bias: Tensor) -> tuple[Any, Tensor]:
        stretch = 1 + self.c.to(bias)
        return None if weight is None else weight * stretch, bias * stretch


@dataclass(frozen=True)
class At(surgery.Method):
    """Insert a module at the outputs of one kind of site."""

    name = "at"
    kinds = ("block", "ffn")

    kind: str = "block"
    stretches: bool = False

    def suits(self, site: surgery.Site) -> bool:
        return site.kind == self.kind

    def splice(self, site: surgery.OpenSite) -> None:
        module = (Stretch if self.stretches else Constant)(site.width)
        site.port("output").insert(module, name=self.name)


def spliced(name: str, *methods: At) -> tuple[Any, dict[str, Tensor], Tensor]:
    model, given = build(name), inputs(name)
    surgery.splice(model, list(methods), example_inputs=given)
    perturb(model, 0.3)
    with torch.no_grad():
        return model, given, logits(model, given)


@pytest.mark.parametrize("name", ["gpt2", "roberta", "bert", "vit", "plain"])
def test_a_constant_folds_and_the_merge_is_undone(name: str) -> None:
    model, given, tuned = spliced(name, At())
    merged = surgery.merge(model)
    assert len(merged.folded) == 2
    with torch.no_grad():
        torch.testing.assert_close(logits(model, given), tuned, rtol=1e-5, atol=1e-5)
        surgery.unmerge(model, merged)
        assert torch.equal(logits(model, given), tuned)
        with surgery.disabled(model):
            assert not torch.allclose(logits(model, given), tuned, atol=1e-3)


def test_a_block_without_a_bias_is_refused_by_name() -> None:
    model, given, tuned = spliced("llama", At())
    with pytest.raises(
        surgery.SpliceError, match=r"layers\.0 cannot be merged.* no bias last of all"
    ):
        surgery.merge(model)
    with torch.no_grad():
        assert torch.equal(logits(model, given), tuned)


@pytest.mark.parametrize("name", ["gpt2", "roberta"])
def test_what_is_no_constant_is_refused(name: str) -> None:
    model, given, tuned = spliced(name, At(stretches=True))
    with pytest.raises(surgery.SpliceError, match="depends on the hidden states"):
        surgery.merge(model)
    with torch.no_grad():
        assert torch.equal(logits(model, given), tuned)


@pytest.mark.parametrize("first", ["ffn", "block"])
def test_what_stands_at_the_bias_folds_before_the_constant(first: str) -> None:
    methods = [At(kind="ffn", stretches=True), At()]
    model, given, tuned = spliced("gpt2", *(methods if first == "ffn" else methods[::-1]))
    surgery.merge(model)
    with torch.no_grad():
        torch.testing.assert_close(logits(model, given), tuned, rtol=1e-5, atol=1e-5)


def test_what_stays_at_the_bias_holds_the_constant_back() -> None:
    model, _, _ = spliced("gpt2", At())
    surgery.insert(model, surgery.locate(model).ffn, "output", lambda y: 2 * y)
    with pytest.raises(surgery.SpliceError, match=r"'insert' at .* stays, and works with"):
        surgery.merge(model, "default")


def test_dropout_of_the_model_does_not_hide_the_bias() -> None:
    model = build("gpt2").train()
    bias = [block.port("output").bias for block in surgery.locate(model).block]
    assert bias == [f"transformer.h.{i}.mlp.c_proj.bias" for i in range(2)]


@dataclass(frozen=True)
class ReadsMore(surgery.Method):
    """Insert a constant whose module is given the padding, too."""

    name = "reads_more"
    kinds = ("block",)

    def splice(self, site: surgery.OpenSite) -> None:
        class Padded(Constant):
            def forward(self, h: Tensor, padding: Tensor) -> Tensor:
                return super().forward(h)

        site.port("output").replace(Padded(site.width), self.name, reads=("output", "padding"))


def test_a_module_that_reads_more_than_the_port_is_told_what() -> None:
    model = build("gpt2")
    surgery.splice(model, ReadsMore())
    perturb(model, 0.3)
    with pytest.raises(surgery.SpliceError, match="its module also reads padding"):
        surgery.merge(model)
