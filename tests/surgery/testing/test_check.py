"""Tests of the contract itself: it finds in a method what a splice cannot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.plugin.registry import registry
from surgery.testing import Shape, check_method, make_model
from surgery.testing.laws import LAWS
from surgery.testing.shapes import shape_of, token_ids
from tests.support.models import build


class Sink(nn.Module):
    """Attention with a sink that starts without weight; wrong where a query sees no key."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.zeros(heads))

    def forward(self, merged: Tensor, lse: Tensor) -> Tensor:
        share = 1 / (1 + self.g[:, None] * torch.exp(-lse))  # (B, H, n)
        heads = merged.unflatten(-1, (share.shape[1], -1))
        return (heads * share.mT.unsqueeze(-1)).flatten(-2)


class Drawn(nn.Module):
    """``h + r w`` with an r that is drawn and not saved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(width))
        self.register_buffer("r", torch.randn(width), persistent=False)

    def forward(self, h: Tensor) -> Any:
        return h + self.w * self.r


class Listed(nn.Module):
    """``h + sum(p)`` with one parameter that is registered, and one in a plain list."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(width))
        self.more = [nn.Parameter(torch.zeros(width))]

    def forward(self, h: Tensor) -> Tensor:
        return h + self.w + self.more[0]


class Nested(nn.Module):
    """``h + p`` with a parameter two lists deep."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.deep = [{"p": nn.Parameter(torch.zeros(width))}]

    def forward(self, h: Tensor) -> Tensor:
        return h + self.deep[0]["p"]


class Constant(nn.Module):
    """``h + c w`` with a tensor c that is no buffer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w, self.c = nn.Parameter(torch.zeros(width)), torch.arange(width) / width

    def forward(self, h: Tensor) -> Tensor:
        return h + self.c.to(h) * self.w


class Stuck(nn.Module):
    """``h + a b h``, where both factors start at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.a * self.b * h


class Half(nn.Module):
    """``h + w r`` with an r that its author has frozen."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(width))
        self.r = nn.Parameter(torch.ones(width), requires_grad=False)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.w * self.r


class Double(nn.Module):
    """``2 h``, without a parameter."""

    def forward(self, h: Tensor) -> Tensor:
        return 2 * h


@dataclass(frozen=True)
class Sinks(surgery.Method):
    """See Sink."""

    name = "sinks"

    def splice(self, site: surgery.Site) -> None:
        site.port("merged").replace(Sink(site.heads), self.name, reads=("merged", "lse"))


MODULES = {
    "drawn": Drawn, "listed": Listed, "nested": Nested, "constant": Constant, "stuck": Stuck,
    "half": Half,
}  # fmt: skip


@dataclass(frozen=True)
class Inserts(surgery.Method):
    """One of MODULES, behind each FFN."""

    name = "inserts"
    kinds = ("ffn",)
    which: str = "drawn"

    def splice(self, site: surgery.Site) -> None:
        site.port("output").insert(MODULES[self.which](site.width), self.name)


@dataclass(frozen=True)
class Doubles(surgery.Method):
    """See Double."""

    name = "doubles"
    kinds = ("ffn",)

    @property
    def start(self) -> surgery.Start:
        return "none"

    def splice(self, site: surgery.Site) -> None:
        site.port("output").insert(Double(), self.name)


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the registry offer the methods of this file, for as long as a test runs."""
    for cls in (Sinks, Inserts, Doubles):
        monkeypatch.setitem(registry()._offered["method"], cls.name, (cls, "tests"))


def said(method: Any, law: str) -> str:
    """What one law says of a method on the model ``fused``."""
    check = next(each.check for each in LAWS if each.name == law)
    with pytest.raises(AssertionError) as error:
        check(method, shape_of("fused"))
    return str(error.value)


def test_a_parameter_in_a_plain_list_is_named_with_the_mend() -> None:
    assert said(Inserts("listed"), "registered") == (
        "Listed: more[0] is a parameter that its module does not know of, so it is neither "
        "trained, moved nor saved. Hold the parameters of more in nn.ParameterList."
    )


def test_a_parameter_deep_in_containers_is_named() -> None:
    assert said(Inserts("nested"), "registered").startswith(
        "Nested: deep[0]['p'] is a parameter that its module does not know of"
    )


def test_a_tensor_that_is_no_buffer_is_named_with_the_mend() -> None:
    assert said(Inserts("constant"), "registered") == (
        "Constant: c is a tensor that its module does not know of, so it is neither trained, moved "
        "nor saved. Write self.register_buffer('c', ...), or nn.Parameter if it is trained."
    )


def test_pytest_adds_nothing_to_what_a_law_says() -> None:
    # pytest rewrites the asserts of an installed package that offers a plugin, unless told not to.
    rewritten = [
        path.stem
        for path in Path(surgery.testing.__file__).parent.glob("*.py")
        if "\n    assert " in path.read_text() and "PYTEST_DONT_REWRITE" not in path.read_text()
    ]
    assert rewritten == []


def test_what_can_never_learn_is_named() -> None:
    text = said(Inserts("stuck"), "learns")
    assert text.startswith("from the start of the method, 4 steps on random batches give ")
    assert "inserts_output.a, " in text
    assert text.endswith(
        "no gradient but zero, so nothing is ever learned there. Let no two factors of a product "
        "start at zero; zero-initialise the last one alone."
    )


def test_a_random_buffer_that_is_not_saved_is_named() -> None:
    assert said(Inserts("drawn"), "saved") == (
        "buffer transformer.h.0.mlp.inserts_output.r is random and is not saved, so a loaded "
        "adapter would draw another. Leave out persistent=False, or draw it from a fixed seed."
    )


def test_a_sink_that_is_wrong_for_padding_is_found() -> None:
    with pytest.raises(AssertionError, match=r"(?s)on fused: start is as declared: .*left padding"):
        check_method(Sinks(), shapes=("fused",))


def test_a_parameter_that_its_author_froze_stays_frozen() -> None:
    model = make_model("fused")
    surgery.splice(model, Inserts("half"))
    for _ in range(2):
        surgery.freeze_base(model)
        trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {"w"}
    check_method(Inserts("half"), shapes=("fused",))


def test_a_method_without_parameters_keeps_the_contract_and_exemptions_are_shown() -> None:
    contract = check_method(Doubles(), shapes=("fused",), exempt={"cached": "acts on all tokens"})
    assert repr(contract) == "fused: 11 laws hold\n  not tried: cached (acts on all tokens)"
    with pytest.raises(AssertionError, match=r"no law 'cache'. Did you mean 'cached'\?"):
        check_method(Doubles(), exempt={"cache": "x"})


def test_a_model_and_inputs_of_ones_own() -> None:
    shape = Shape("mine", lambda: build("plain"), {"input_ids": token_ids()})
    contract = check_method("lora", shapes=[shape])
    assert len(contract.held["mine"]) == len(LAWS) - 2


def test_a_refused_merge_says_what_is_missing() -> None:
    model = make_model("fused")
    surgery.splice(model, Doubles())
    with pytest.raises(surgery.SpliceError, match=r"its module Double has no fold\(weight, bias\)"):
        surgery.merge(model)


def test_a_class_in_place_of_a_method_is_told() -> None:
    with pytest.raises(AssertionError, match=r"Pass an object of it: check_method\(Doubles\(\)\)"):
        check_method(Doubles)  # type: ignore[arg-type]
