"""What an inserted module may offer, and names that are almost one of the offers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from tests.support.custom_methods import Custom
from tests.support.methods import default
from tests.support.models import build, inputs


class Update(nn.Module):
    """A zero-initialised update, to be given further attributes."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def splice(module: nn.Module) -> surgery.Report:
    model = build("gpt2")
    method = Custom(lambda site: site.port("output").insert(module, "x"))
    return surgery.splice(model, method, example_inputs=inputs("gpt2"))


def having(**attributes: Any) -> nn.Module:
    return type("Shift", (Update,), attributes)()


@pytest.mark.parametrize(
    ("near", "meant"),
    [
        ("fold_inputs", "fold_input"),
        ("folds", "fold"),
        ("Fold", "fold"),
        ("rests", "rest"),
        ("plain_states", "plain_state"),
        ("plainstate", "plain_state"),
        ("total_lses", "total_lse"),
        ("need_bias", "needs_bias"),
        ("no_weight_decays", "no_weight_decay"),
    ],
)
def test_a_name_that_is_almost_an_offer_is_refused_at_insertion(near: str, meant: str) -> None:
    with pytest.raises(surgery.PortError, match=rf"Shift\.{near} is never used.*{meant!r}"):
        splice(having(**{near: lambda self, *given: given}))


def test_a_parameter_of_forward_that_is_almost_onto_is_refused() -> None:
    def forward(self: Any, x: Tensor, on_to: Tensor | None = None) -> Tensor:
        return x + self.shift

    with pytest.raises(surgery.PortError, match=r"parameter 'on_to'.*'onto'"):
        splice(having(forward=forward))


@pytest.mark.parametrize(
    ("offer", "function"),
    [
        ("fold", lambda self, weight: (weight, None)),
        ("fold_input", lambda self: None),
        ("plain_state", lambda self, prefix: {}),
    ],
)
def test_an_offer_that_does_not_take_its_arguments_is_refused(offer: str, function: Any) -> None:
    with pytest.raises(surgery.PortError, match=rf"Shift\.{offer} is called with"):
        splice(having(**{offer: function}))


@pytest.mark.parametrize("name", ["reset", "unfold", "folding", "arrest", "totals", "_fold"])
def test_other_names_are_left_alone(name: str) -> None:
    splice(having(**{name: lambda self: None}))


@pytest.mark.parametrize("name", surgery.methods())
def test_every_built_in_module_is_what_the_protocols_say(name: str) -> None:
    model = build("gpt2")
    report = surgery.splice(model, default(name), example_inputs=inputs("gpt2"))
    for inserted in report.inserted:
        module = model.get_submodule(inserted.path)
        assert isinstance(module, surgery.Foldable) == hasattr(module, "fold")
        if isinstance(module, surgery.PartlyFoldable):
            assert isinstance(module, surgery.Foldable)


def test_a_verb_outside_of_splice_is_refused() -> None:
    site = surgery.locate(build("gpt2"), inputs("gpt2"))[0]
    with pytest.raises(surgery.PortError, match=r"only inside Method\.splice"):
        site.port("output").insert(Update(), "x")  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="no attribute 'inserts'"):
        site.port("output").inserts  # type: ignore[attr-defined] # noqa: B018
