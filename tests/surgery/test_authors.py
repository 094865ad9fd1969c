"""What authors of methods get wrong is said, with place and way out, and nothing is left."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from surgery.plugin.registry import Registry, in_order, registry
from surgery.testing import check_method
from tests.models import build, inputs, logits, perturb
from tests.surgery.test_registry import plugin, point

WIDTH = build("gpt2").config.n_embd


class Shift(nn.Module):
    """``h + w``, through a function that a test may bend."""

    def __init__(self, bend: Callable[[Tensor], Any] = lambda h: h, width: int = WIDTH) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(width))
        self.bend = bend

    def forward(self, h: Tensor) -> Any:
        return self.bend(h + self.w)


@dataclass(frozen=True)
class Custom(surgery.Method):
    """Does at each site what a test says."""

    name = "custom"
    kinds = ("ffn",)
    act: Any = field(default=None, compare=False)
    declared: Any = "exact"

    @property
    def start(self) -> Any:
        return self.declared

    def options(self) -> dict[str, Any]:
        return {}

    def splice(self, site: surgery.Site) -> None:
        self.act(site)


def refused(act: Callable[[surgery.Site], Any], match: str, start: str = "none") -> None:
    """Splicing what ``act`` inserts is refused, and the model is as it was."""
    model, x = build("gpt2"), inputs("gpt2")
    expected, state = logits(model, x), {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(surgery.SurgeryError, match=match):
        surgery.splice(model, Custom(act, start))
    assert torch.equal(logits(model, x), expected)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def insert(module: Any, name: str = "x") -> Callable[[surgery.Site], None]:
    return lambda site: site.port("output").insert(module, name)


@pytest.mark.parametrize("start", ["none", "exact"])
@pytest.mark.parametrize(
    ("bend", "what"),
    [
        (lambda h: h[..., :1], r"\(2, 7, 1\) torch.float32, where port 'output' has \(2, 7, 32\)"),
        (lambda h: h[:, :1], r"x_output gives \(2, 1, 32\)"),
        (lambda h: h.double(), r"torch.float64, where port 'output' has .* torch.float32\. Return"),
        (lambda h: None, "x_output gives None"),
        (lambda h: (h, h), r"x_output gives \(tensor"),
    ],
)
def test_what_a_module_gives_must_fit_its_port(bend: Any, what: str, start: str) -> None:
    refused(insert(Shift(bend)), what, start)


def test_what_is_added_or_replaces_must_fit_too() -> None:
    narrow = nn.Linear(WIDTH, WIDTH - 1)
    refused(
        lambda s: s.port("output").add(narrow, "x", ("input",)), rf"gives \(2, 7, {WIDTH - 1}\)"
    )
    refused(lambda s: s.port("output").replace(narrow, "x", ("input",)), "where port 'output' has")
    refused(lambda s: s.port("up").feed(narrow, "x"), "x_up gives")


@pytest.mark.parametrize(
    ("act", "what"),
    [
        (insert(lambda h: h), "is no nn.Module. Pass an object"),
        (insert(Shift), "is no nn.Module. Pass an object"),
        (insert(Shift(), "my.mod"), "'my.mod' must be an identifier"),
        (lambda s: s.port("output").add(Shift(), "x", "input"), r"must be a tuple: \('input',\)"),
        (lambda s: s.port("output").add(Shift(), "x", ("activation.source",)), "read as it is"),
        (lambda s: 1 / 0, "method 'custom' fails in its splice.*ZeroDivisionError"),
        (lambda s: s.port("output").insert(s.base().c_fc, "x"), "the module of what is inserted"),
        (lambda s: s.port("output").insert(s.base(), "x"), "is part of the base, and would be"),
        (lambda s: s.port("output").insert(nn.Sequential(s.base().c_fc), "x"), "0 of what is ins"),
    ],
)
def test_what_cannot_be_inserted_is_said_at_once(act: Any, what: str) -> None:
    refused(act, what)


def test_calls_can_only_be_wrapped_and_lse_only_be_read() -> None:
    model = build("gpt2")

    @dataclass(frozen=True)
    class Wrong(Custom):
        kinds = ("block", "attention")

    for port, what in (("call", "only be wrapped"), ("lse", "only be read")):

        def act(site: surgery.Site, port: str = port) -> None:
            if port in site.ports:
                site.port(port).insert(Shift(), "x")
            elif site.kind == "attention":
                site.port("output").insert(Shift(), "x")
            else:
                site.port("call").wrap(Shift(), "x")

        with pytest.raises(surgery.PortError, match=what):
            surgery.splice(model, Wrong(act))

    class Raises(nn.Module):
        def forward(self, forward: Any, **arguments: Any) -> Any:
            raise ZeroDivisionError("mine")

    def wrap(site: surgery.Site) -> None:
        if site.kind == "block":
            site.port("call").wrap(Raises(), "x")
        else:
            site.port("output").insert(nn.Identity(), "y")

    with pytest.raises(surgery.SpliceError, match=r"the forward fails with custom .*Zero.*mine"):
        surgery.splice(model, Wrong(wrap))
    assert not [n for n, _ in model.named_modules() if n.endswith(("x_call", "y_output"))]


def test_what_a_class_declares_is_checked() -> None:
    model = build("gpt2")

    @dataclass(frozen=True)
    class Kinds(Custom):
        kinds = ("blocks",)

    @dataclass(frozen=True)
    class Options(surgery.Method):
        name, kinds = "options", ("ffn",)
        act: Any = F.gelu

    for method, what in (
        (Kinds(), "no kind of site 'blocks'. Did you mean 'block'"),
        (Custom(None, "exakt"), "start='exakt' must be one of exact, gated, none"),
        (Options(), "options': act=.* is nothing that JSON can hold"),
    ):
        with pytest.raises(surgery.MethodError, match=what):
            surgery.splice(model, method)


class Shared(nn.Module):
    """``x + h(z)``, h shared by all sites and zero at the start."""

    def __init__(self, site: surgery.Site) -> None:
        super().__init__()
        self.h: Any = site.share("h", lambda: nn.Linear(8, site.width))
        if isinstance(self.h, nn.Linear):
            nn.init.zeros_(self.h.weight)
            nn.init.zeros_(self.h.bias)
        self.z = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.h(self.z)
        return x + made

    def fold(self, weight: Tensor, bias: Tensor) -> Any:
        return weight, bias + self(torch.zeros(())).to(bias)

    needs_bias = True


def test_a_network_that_all_layers_share_may_start_at_zero() -> None:
    model, x = build("gpt2"), inputs("gpt2")
    expected = logits(model, x)
    surgery.splice(model, Custom(lambda site: site.port("output").insert(Shared(site), "x")))
    assert torch.equal(logits(model, x), expected)
    perturb(model)
    moved = logits(model, x)
    surgery.merge(model)
    torch.testing.assert_close(logits(model, x), moved, rtol=1e-4, atol=1e-5)


def test_what_others_use_is_not_folded_away() -> None:
    """Layer 0 owns what layer 1 uses; layer 1 stays, for something stands in its way."""
    model, x = build("gpt2"), inputs("gpt2")
    second = surgery.locate(model).ffn[1:]
    surgery.splice(model, Custom(insert(Shift(torch.tanh)), "none"), at=second, name="first")
    surgery.splice(
        model, Custom(lambda site: site.port("output").insert(Shared(site), "x")), name="second"
    )
    perturb(model)
    expected = logits(model, x)
    with pytest.raises(surgery.SpliceError, match="'custom' stands before it and stays"):
        surgery.merge(model, "second")
    merged = surgery.merge(model, "second", partial=True)
    assert not merged.folded
    assert len(merged.left) == 2
    assert [n for n in model.state_dict() if "x_output.h" in n]
    assert torch.equal(logits(model, x), expected)
    model.double()
    torch.testing.assert_close(logits(model, x).float(), expected, rtol=1e-4, atol=1e-5)


class Rescaled(nn.Module):
    """Adds what it takes for each output of W to have the norm m; it reads W as the base has it."""

    def __init__(self, port: surgery.Port) -> None:
        super().__init__()
        self.base = port.frozen()
        self.m = nn.Parameter(self.base.matrix().norm(dim=0).clone())

    def factor(self) -> Tensor:
        return self.m / self.base.matrix().norm(dim=0) - 1

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.base.matrix() * self.factor()

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.base.matrix() * self.factor(), bias


def test_a_module_that_reads_the_weight_it_is_folded_into_can_be_folded() -> None:
    def act(site: surgery.Site) -> None:
        for port in site.select(("query", "value")):  # columns of one fused projection
            port.add(Rescaled(port), "x")

    @dataclass(frozen=True)
    class Attention(Custom):
        kinds = ("attention",)

    model, x = build("gpt2"), inputs("gpt2")
    surgery.splice(model, Attention(act))
    perturb(model)
    expected = logits(model, x)
    surgery.merge(model)
    assert not list(surgery.spliced_parameters(model))
    torch.testing.assert_close(logits(model, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fold", "what"),
    [
        (lambda self, w, b: w, "fold fails|fold gives other shapes"),
        (lambda self, w, b: (w.T, b), "its fold gives other shapes"),
        (lambda self, w, b: (w, None), "its fold gives other shapes"),
        (lambda self, w, b: 1 / 0, "its fold fails .ZeroDivisionError"),
    ],
)
def test_a_fold_that_is_wrong_is_named(fold: Any, what: str) -> None:
    model, x = build("gpt2"), inputs("gpt2")

    class Folding(Shift):
        pass

    Folding.fold = fold  # type: ignore[attr-defined]
    surgery.splice(model, Custom(lambda site: site.port("output").insert(Folding(), "x")))
    perturb(model)
    expected = logits(model, x)
    with pytest.raises(surgery.SpliceError, match=rf"method 'custom' at .*({what})"):
        surgery.merge(model)
    assert torch.equal(logits(model, x), expected)


def test_a_method_that_no_plugin_offers_is_saved_with_a_warning(tmp_path: Path) -> None:
    model = build("gpt2")
    surgery.splice(model, Custom(insert(Shift()), "none"), at=surgery.locate(model).ffn[:1])
    with pytest.warns(UserWarning, match="no installed plugin offers 'custom'"):
        folder = surgery.save(model, tmp_path / "a")
    with pytest.raises(surgery.StoreError, match="a cannot be loaded here: no method 'custom'"):
        surgery.load(build("gpt2"), folder)
    assert json.loads((folder / "surgery.json").read_text())["splices"]


def test_plugins_that_offer_nothing_are_reported() -> None:
    made = Registry()
    wrong: Any = types.SimpleNamespace(
        register_method=surgery.hookimpl(lambda register: register(Custom))
    )
    with pytest.raises(surgery.MethodError, match=r"no hook .register_method"):
        made.add(wrong, "typo")
    silent: Any = types.SimpleNamespace(register_methods=surgery.hookimpl(lambda register: Custom))
    with pytest.raises(surgery.MethodError, match="'silent' offers nothing"):
        made.add(silent, "silent")

    class Plain(surgery.Method):
        name = "plain"
        rank: int = 3

    for offered, what in ((Plain, "not a dataclass"), (Custom(), r"no class. Call register")):
        bad: Any = types.SimpleNamespace(
            register_methods=surgery.hookimpl(lambda register, offered=offered: register(offered))
        )
        with pytest.raises(surgery.MethodError, match=what):
            made.add(bad, "bad")
    assert not made.methods()


def test_no_plugin_takes_the_place_of_a_built_in() -> None:
    plugin("plugin_aaa", "lora")
    made = Registry()
    with pytest.warns(RuntimeWarning, match="'aaa' .* could not be loaded.*both offer .*'lora'"):
        made.load(in_order([point("aaa", "plugin_aaa"), point("lora", "surgery_plugins.lora")]))
    assert made.methods()["lora"] is registry().methods()["lora"]


def test_what_works_only_together_is_verified_alone_where_there_is_no_trunk() -> None:
    @dataclass(frozen=True)
    class Together(Custom):
        together = True

    class Unused(Shift):
        def forward(self, h: Tensor) -> Any:
            return h

    model = build("gpt2")
    act = insert(Unused())
    for at in (None, list(surgery.locate(model).ffn)[:1]):
        with pytest.raises(surgery.SpliceError, match="x_output"):
            surgery.splice(model, Together(act, "none"), at=at)


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


@dataclass(frozen=True)
class Sinks(surgery.Method):
    """See Sink."""

    name = "sinks"

    def splice(self, site: surgery.Site) -> None:
        site.port("merged").replace(Sink(site.heads), self.name, reads=("merged", "lse"))


@dataclass(frozen=True)
class Draws(surgery.Method):
    """See Drawn."""

    name = "draws"
    kinds = ("ffn",)

    def splice(self, site: surgery.Site) -> None:
        site.port("output").insert(Drawn(site.width), self.name)


@pytest.mark.parametrize(
    ("method", "what"),
    [
        (Sinks(), "start is as declared: .*left padding"),
        (Draws(), "saved and loaded is the same: the loaded adapter gives other bits"),
        (Custom(insert(nn.Identity())), "gradients reach .*RuntimeError: element 0 of tensors"),
    ],
)
def test_the_contract_finds_what_a_splice_cannot(
    method: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = {**surgery.methods(), method.name: type(method)}
    monkeypatch.setattr(Registry, "methods", lambda self: offered)
    monkeypatch.setitem(registry()._offered["method"], method.name, (type(method), "tests"))
    with pytest.raises(AssertionError, match=rf"(?s)on fused: {what}"):
        check_method(method)
