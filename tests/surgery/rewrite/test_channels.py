"""Convolutions of one position, and windows, act as the linear layers of their twin do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import surgery
from tests.support.models import perturb
from tests.support.vision import (
    SIDE,
    WIDTH,
    Channels,
    Folded,
    Interleaved,
    Pooled,
    Tokens,
    Windows,
)

METHODS = {
    "lora": surgery.method("lora", rank=2, ports="all"),
    "dora": surgery.method("dora", rank=2, ports="all"),
    "ia3": surgery.method("ia3"),
    "bitfit": surgery.method("bitfit"),
    "inducer": surgery.method("inducer", key_rank=2, value_rank=2),
    "prefix": surgery.method("prefix", length=3),
    "gated": surgery.method("prefix", length=3, gate=True),
    "adapter": surgery.method("ffn_adapter", rank=3),
}


def tokens_of(image: Tensor) -> Tensor:
    return image.flatten(2).mT


def alike(method: surgery.Method, made: nn.Module, twin: nn.Module) -> tuple[Tensor, Tensor]:
    """The outputs of both with the same method and the same inserted values, as tokens."""
    x = torch.randn(2, WIDTH, SIDE, SIDE)
    images = isinstance(made, Channels)
    for model, given in ((made, x if images else tokens_of(x)), (twin, tokens_of(x))):
        surgery.splice(model, method, example_inputs=given)
    perturb(twin, 0.5)
    pairs = zip(surgery.spliced_parameters(made), surgery.spliced_parameters(twin), strict=True)
    with torch.no_grad():
        for (_, ours), (_, theirs) in pairs:
            ours.copy_(theirs)
    out = made(x if images else tokens_of(x))
    return tokens_of(out) if images else out, twin(tokens_of(x))


KINDS = [
    (make, name)
    for make in (Channels, Windows, Folded, Interleaved)
    for name in METHODS
    # A of LoRA and DoRA has the columns of the layer's own weight, in which the twin differs.
    if (make, name) not in ((Interleaved, "lora"), (Interleaved, "dora"))
]


@pytest.mark.parametrize(("make", "name"), KINDS)
@pytest.mark.few(16)
def test_convolutions_and_windows_act_as_their_twin(
    make: Callable[[], nn.Module], name: str
) -> None:
    torch.manual_seed(0)
    made = make().double().eval()
    twin = Tokens(made, windows=make is not Channels).double().eval()
    if isinstance(made, Interleaved):
        twin.out.weight.data = made.out.weight.data[:, made.order]
    base = twin(tokens_of(torch.ones(1, WIDTH, SIDE, SIDE).double()))
    torch.set_default_dtype(torch.float64)
    try:
        ours, theirs = alike(METHODS[name], made, twin)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    moved = twin(tokens_of(torch.ones(1, WIDTH, SIDE, SIDE).double()))
    assert not torch.allclose(moved, base)


@pytest.mark.parametrize("name", ["inducer", "prefix", "gated"])
def test_what_is_added_to_a_context_stays_out_of_the_edits(name: str) -> None:
    torch.manual_seed(0)
    made = Pooled().double().eval()
    twin = Pooled(made, behind=True).double().eval()
    torch.set_default_dtype(torch.float64)
    try:
        ours, theirs = alike(METHODS[name], made, twin)
    finally:
        torch.set_default_dtype(torch.float32)
    assert ours.shape == (2, SIDE**2 // 2, WIDTH)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_merge_folds_into_the_kernel() -> None:
    torch.manual_seed(0)
    model, x = Channels().double().eval(), torch.randn(2, WIDTH, SIDE, SIDE).double()
    surgery.splice(model, METHODS["lora"], example_inputs=x)
    perturb(model)
    before = model(x)
    merged = surgery.merge(model)
    assert len(merged.folded) == 6
    assert not merged.left
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    assert model.qkv.weight.shape == (3 * WIDTH, WIDTH, 1, 1)


def test_a_graph_serves_other_sizes_of_image() -> None:
    torch.manual_seed(0)
    model = Channels().eval()
    surgery.splice(model, METHODS["prefix"], example_inputs=torch.randn(2, WIDTH, SIDE, SIDE))
    perturb(model, 0.5)
    x = torch.randn(3, WIDTH, 5, 7)
    rows = torch.cat([model(x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model(x), rows)


class Strided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(WIDTH, 5, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(x).relu()


def test_a_convolution_with_strides_reads_every_second_position() -> None:
    torch.manual_seed(0)
    model, x = Strided().double(), torch.randn(2, WIDTH, 5, 4).double()
    surgery.splice(model, METHODS["lora"], example_inputs=x)
    perturb(model)
    before = model(x)
    surgery.merge(model)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)


def test_a_convolution_in_channels_last_starts_equal() -> None:
    torch.manual_seed(0)
    model = Channels().eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, WIDTH, SIDE, SIDE).to(memory_format=torch.channels_last)
    base = model(x)
    surgery.splice(model, [METHODS["lora"], METHODS["inducer"]], example_inputs=x)
    assert torch.equal(model(x), base)
    assert model(x).stride() == base.stride()
