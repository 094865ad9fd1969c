"""LoRA of convolutions from and to PEFT, beside PEFT's own outputs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import surgery
from tests.support.models import perturb
from tests.support.peft_cases import move
from tests.support.pictures import CONVOLUTIONS, Pictures, pictures
from tests.support.vision import Channels

RUN = [kind for kind in CONVOLUTIONS if kind != "dilated, reflecting"]


class EveryPosition(nn.Module):
    """A convolution, and a head for each of its positions."""

    def __init__(self, first: Any) -> None:
        super().__init__()
        self.first, self.head = first, nn.Linear(first.out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.first(x).movedim(1, -1))
        return y


def close(a: Tensor, b: Tensor) -> None:  # the same sums of up to 64 products, in another order
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def adapted(model: nn.Module, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options)).eval()
    move(theirs)
    return theirs


def reloaded(model: nn.Module, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()


def save(theirs: Any, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(folder)


def goes_there_and_back(model: nn.Module, x: Tensor, folder: Path, **options: Any) -> None:
    """PEFT's folder, ours from it, PEFT's from ours: equal outputs, and tensors with its bits."""
    theirs = adapted(model, **options)
    expected = theirs(x).detach()
    assert not torch.allclose(model(x), expected, atol=1e-3)
    save(theirs, folder / "theirs")
    ours = surgery.load(copy.deepcopy(model), folder / "theirs", example_inputs=x)
    close(ours(x), expected)
    surgery.save(ours, folder / "ours", format="peft")
    close(reloaded(model, folder / "ours")(x), expected)
    files = [load_file(folder / f / "adapter_model.safetensors") for f in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())
    close(surgery.from_peft(theirs, example_inputs=x)(x), expected)


@pytest.mark.parametrize("kind", RUN)
@pytest.mark.parametrize("options", [{}, {"lora_bias": True, "use_rslora": True}])
def test_there_and_back(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, x = pictures(kind)
    goes_there_and_back(model, x, tmp_path, r=6, lora_alpha=5,
                        target_modules=["first", "head"], **options)  # fmt: skip


@st.composite
def convolutions(draw: Any) -> tuple[nn.Module, int]:
    """A convolution of any size that PEFT updates at its own positions, and a rank."""
    groups, axes = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    sizes = st.lists(st.integers(1, 4), min_size=axes, max_size=axes).map(tuple)
    kernel = draw(sizes.filter(lambda size: set(size) != {1}))
    padding = draw(st.sampled_from([0, 1, 2]))
    kind = (nn.Conv1d, nn.Conv2d)[axes - 1]
    channels, out = draw(st.integers(1, 3)) * groups, draw(st.integers(1, 3)) * groups
    bias, stride = draw(st.booleans()), draw(sizes)
    module = kind(channels, out, kernel, stride, padding, groups=groups, bias=bias)
    return module, groups * draw(st.integers(1, 2))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(convolutions())
def test_any_convolution_goes_there_and_back(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[Any, int]
) -> None:
    first, rank = drawn
    torch.manual_seed(0)
    for parameter in first.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, first.in_channels, *[9] * len(first.kernel_size))
    folder = tmp_path_factory.mktemp("adapter")
    model = EveryPosition(first).eval()
    goes_there_and_back(model, x, folder, r=rank, target_modules=["first", "head"])


@pytest.mark.parametrize("kind", RUN)
def test_what_was_trained_here_gives_the_same_outputs_in_peft(kind: str, tmp_path: Path) -> None:
    """With groups that share A, PEFT's rank is that many times as large."""
    model, x = pictures(kind)
    base = copy.deepcopy(model)
    lora = surgery.method("lora", rank=3, ports=("output",), bias=base.first.bias is not None)
    surgery.splice(model, lora, at=surgery.locate(model, x).convolution)
    perturb(model, 0.3)
    surgery.save(model, tmp_path, format="peft")
    close(reloaded(base, tmp_path)(x), model(x))
    close(surgery.load(copy.deepcopy(base), tmp_path, example_inputs=x)(x), model(x))
    groups: Any = base.first.groups
    assert peft.LoraConfig.from_pretrained(str(tmp_path)).r == 3 * groups


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_of_one_position_are_projections(groups: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Channels()).eval()
    model[0].wide = nn.Conv2d(12, 20, 1, groups=groups)  # type: ignore[union-attr]
    x = torch.randn(2, 12, 4, 4)
    targets = ["qkv", "out", "wide", "narrow"]
    theirs = adapted(model, r=4, target_modules=targets)
    expected = theirs(x).detach()
    save(theirs, tmp_path / "theirs")
    ours = surgery.load(copy.deepcopy(model), tmp_path / "theirs", example_inputs=x)
    close(ours(x), expected)
    surgery.save(ours, tmp_path / "ours", format="peft")
    close(reloaded(model, tmp_path / "ours")(x), expected)


SIZES = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: tr.ResNetForImageClassification(tr.ResNetConfig(**SIZES)), {}),
        (
            lambda: tr.RegNetForImageClassification(tr.RegNetConfig(**SIZES, groups_width=4)),
            {"rank_pattern": {"layer.0.convolution": 8}},
        ),
    ],
    ids=["resnet", "regnet"],
)
def test_every_convolution_of_a_vision_model(
    make: Callable[[], Any], options: dict[str, Any], tmp_path: Path
) -> None:
    """Of one position or of more, with strides and, in RegNet, in groups."""
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(2, 3, 32, 32)
    theirs = adapted(model, r=4, target_modules=["convolution"], **options)
    expected = theirs(x).logits.detach()
    save(theirs, tmp_path / "theirs")
    example = {"pixel_values": x}
    ours = surgery.load(copy.deepcopy(model), tmp_path / "theirs", example_inputs=example)
    close(ours(x).logits, expected)
    surgery.save(ours, tmp_path / "ours", format="peft")
    close(reloaded(model, tmp_path / "ours")(x).logits, expected)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"dilation": 2, "padding": 2}, r"dilation=\(2, 2\)"),
        ({"padding": 1, "padding_mode": "reflect"}, "padding_mode='reflect'"),
        ({"padding": "same", "padding_mode": "circular"}, "padding_mode='circular'"),
    ],
)
def test_what_peft_leaves_out_of_its_update_is_refused(
    setting: dict[str, Any], said: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base, x = Pictures(nn.Conv2d(4, 6, 3, **setting)).eval(), torch.randn(2, 4, 5, 5)
    adapted(base, target_modules=["first"]).save_pretrained(tmp_path / "theirs")
    with pytest.raises(surgery.StoreError, match=rf"updates first, a convolution with {said}"):
        surgery.load(copy.deepcopy(base), tmp_path / "theirs", example_inputs=x)
    lora = surgery.method("lora", rank=2, ports=("output",))
    model = copy.deepcopy(base)
    surgery.splice(model, lora, at=surgery.locate(model, x).convolution)
    with pytest.raises(surgery.SpliceError, match=rf"LoRA of first, a convolution with {said}"):
        surgery.save(model, tmp_path / "ours", format="peft")
    assert not (tmp_path / "ours").exists()


def test_a_rank_that_the_groups_do_not_divide_is_refused(tmp_path: Path) -> None:
    model, x = pictures("groups")
    adapted(model, r=4, target_modules=["first"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"r": 4', '"r": 3'))
    with pytest.raises(surgery.StoreError, match="rank of first is 3, which its 2 groups"):
        surgery.load(model, tmp_path, example_inputs=x)
