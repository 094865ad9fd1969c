"""Honesty: what a splice, a merge or a copy did must be what it says that it did."""

from __future__ import annotations

import copy
import pickle
import stat
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tr
from torch import Tensor, nn

import surgery
from surgery.adapter.training import kept_parameters
from surgery.attention.library_functions import with_lse
from surgery.attention.sdpa import attention
from surgery.errors import SpliceError, SurgeryError
from surgery.plugin.registry import Registry
from tests.models import build, inputs, logits, perturb

Named = tuple[str, dict[str, Any]]


def methods(*named: Named) -> list[surgery.Method]:
    return [surgery.method(name, **options) for name, options in named]


@pytest.mark.parametrize(
    ("first", "second", "how"),
    [
        ([("ffn_adapter", {"placement": "pfeiffer"})], [("lora", {"ports": ("output",)})], "b"),
        ([("lora", {"ports": ("key", "value")})], [("prefix", {"share": "simple"})], "a"),
        ([("bitfit", {})], [("prefix", {"share": "simple", "std": 0.5})], "a"),
        ([("bitfit", {})], [("ssb", {})], "a"),
        ([("inducer", {}), ("ssb", {"ports": ("output",)})], [], "partial"),
        ([("lora", {"ports": ("up",)}), ("ffn_adapter", {"placement": "pfeiffer"})], [], "partial"),
        ([("ssb", {}), ("bitfit", {})], [], "partial"),
    ],
)  # fmt: skip
def test_what_is_merged_beside_others_leaves_outputs_or_is_refused(
    first: list[Named], second: list[Named], how: str
) -> None:
    x, model = inputs("gpt2"), build("gpt2").double()
    surgery.splice(model, methods(*first), name="a")
    if second:
        surgery.splice(model, methods(*second), name="b")
    perturb(model, 0.3)
    before = logits(model, x)
    refusal = pytest.raises(SpliceError, match="cannot be merged")
    with nullcontext() if how == "partial" else refusal:
        surgery.merge(model, **({"partial": True} if how == "partial" else {"name": how}))
    torch.testing.assert_close(logits(model, x), before, rtol=0, atol=1e-12)


def test_a_refused_module_stands_in_the_way_of_those_behind_it() -> None:
    """Llama's projections have no bias to take LoRA's up; (IA)^3 behind it must wait."""
    x, model = inputs("llama"), build("llama").double()
    ports = {"ports": ("key", "value")}
    surgery.splice(model, methods(("lora", {"bias": True, **ports}), ("ia3", ports)))
    perturb(model, 0.3)
    before = logits(model, x)
    surgery.merge(model, partial=True)
    torch.testing.assert_close(logits(model, x), before, rtol=0, atol=1e-12)


def test_a_merged_weight_must_fit_its_dtype() -> None:
    model = build("gpt2").half()
    surgery.splice(model, surgery.method("ia3"))
    with torch.no_grad():
        for _, parameter in surgery.spliced_parameters(model):
            parameter.fill_(6e4)
        model.transformer.h[0].attn.c_attn.weight.fill_(600)
    with pytest.raises(SpliceError, match=r"not finite in torch.float16\. Nothing has changed"):
        surgery.merge(model)


def test_a_shared_prefix_follows_the_weights_that_it_is_made_with() -> None:
    x, model = inputs("gpt2"), build("gpt2")
    surgery.splice(model, surgery.method("prefix", share="simple", std=0.5))
    logits(model, x)
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight.mul_(1.5)
    now = logits(model, x)
    for module in model.modules():
        vars(module).pop("_known", None) and setattr(module, "_known", None)
    assert torch.equal(now, logits(copy.deepcopy(model), x))


class Raw(nn.Module):
    """Attention and FFN of raw parameters in one module: their sites have one path and key."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {
            **dict.fromkeys(("wq", "wk", "wv", "wo"), (width, width)),
            "w1": (width, 32), "w2": (32, width),
        }.items():  # fmt: skip
            weight = torch.randn(shape, generator=generator) * 0.2
            self.register_parameter(name, nn.Parameter(weight))

    def mixed(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = ((x @ w).view(b, n, 4, -1).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
        return x + mixed @ self.wo

    def thought(self, x: Tensor) -> Tensor:
        return F.gelu(x @ self.w1) @ self.w2

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixed(x)
        return x + self.thought(x)


def test_an_edit_of_an_ffn_leaves_the_attention_beside_it() -> None:
    model, x = Raw().eval(), torch.randn(2, 5, 16)
    sites = surgery.locate(model, x)
    assert {(site.path, site.key) for site in sites} == {("", "")}
    surgery.splice(model, surgery.method("ffn_adapter", placement="pfeiffer", rank=2), at=sites.ffn)
    perturb(model, 0.5)
    y = model.mixed(x)
    thought = model.thought(y)
    expected = y + thought + model.ffn_adapter_output(thought)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class Scaled(surgery.Method):
    """``y * a`` at a port; what it declares may be a lie."""

    name = "scaled"
    kinds = ("attention", "ffn")
    kind: str = "ffn"
    port: str = "output"
    factor: float = 2.0
    declared: surgery.Start = "exact"
    adds: bool = False

    @property
    def start(self) -> surgery.Start:
        return self.declared

    def suits(self, site: surgery.Site) -> bool:
        return site.kind == self.kind

    def splice(self, site: surgery.Site) -> None:
        made, port = Times(site.ports[self.port].width, self.factor), site.port(self.port)
        if self.adds:
            port.add(made, name=self.name, reads=(self.port,))
        else:
            port.insert(made, name=self.name)


class Times(nn.Module):
    def __init__(self, width: int, factor: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.full((width,), factor))

    def forward(self, y: Tensor) -> Tensor:
        return y * self.a


@pytest.mark.parametrize("declared", ["exact", "gated"])
@pytest.mark.parametrize("factor", [2.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "beside", [[], [("ffn_adapter", {"placement": "block"})], [("prefix", {})]]
)
def test_a_start_that_is_none_is_found_out(
    declared: surgery.Start, factor: float, beside: list[Named]
) -> None:
    model = build("roberta")
    with pytest.raises(SpliceError, match=f"declares start '{declared}'"):
        surgery.splice(model, [Scaled(factor=factor, declared=declared), *methods(*beside)])
    assert not surgery.summary(model).reports


@pytest.mark.parametrize("batch_first", [True, False])
def test_merged_heads_keep_to_their_sequences(batch_first: bool) -> None:
    torch.manual_seed(0)
    base = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=batch_first).double().eval()
    x = torch.randn(2, 5, 16).double()
    expected = copy.deepcopy(base)
    expected.self_attn.out_proj.weight.data.mul_(1.5)
    half = Scaled("attention", "merged", 0.5, "none", adds=True)
    surgery.splice(base, half, example_inputs=x)
    torch.testing.assert_close(base(x), expected(x), rtol=0, atol=1e-12)


def test_what_is_inserted_into_a_model_in_training_trains() -> None:
    x, model = inputs("gpt2"), build("gpt2").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    surgery.splice(model, surgery.method("lora", dropout=0.5))
    perturb(model)
    assert all(module.training for module in model.modules())
    assert not torch.equal(logits(model, x), logits(model, x))


def rows_with_gradient(model: nn.Module, x: Any) -> int:
    model.zero_grad()
    logits(model, x).sum().backward()
    gradient = model.transformer.wte.weight.grad
    return 0 if gradient is None else int((gradient != 0).any(-1).sum())


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_trains_the_same_rows(way: Any) -> None:
    x, model = inputs("gpt2"), build("gpt2")
    surgery.splice(model, surgery.method("lora"))
    surgery.freeze_base(model)
    surgery.train_rows(model, "transformer.wte.weight", [7])
    copied = way(model)
    assert rows_with_gradient(model, x) == rows_with_gradient(copied, x) == 1
    surgery.train_rows(copied, "transformer.wte.weight", [7, 8])
    assert (rows_with_gradient(model, x), rows_with_gradient(copied, x)) == (1, 2)


def test_rows_are_forgotten_with_what_they_went_with() -> None:
    x, model = inputs("gpt2"), build("gpt2")
    surgery.splice(model, surgery.method("lora"))
    surgery.train_rows(model, "transformer.wte.weight", [7])
    surgery.freeze_base(model, keep=["transformer.wte"])
    assert rows_with_gradient(model, x) > 1
    surgery.train_rows(model, "transformer.wte.weight", [7])
    surgery.remove(model)
    model.requires_grad_(True)
    assert rows_with_gradient(model, x) > 1


@dataclass(frozen=True)
class Twice(surgery.Method):
    """One module fed to two ports of a projection."""

    name = "twice"

    def splice(self, site: surgery.Site) -> None:
        made = Times(site.width, 1.0)
        for name in ("key", "value"):
            site.port(name).feed(made, name=self.name)


@dataclass(frozen=True)
class Fed(Twice):
    name = "fed"

    def splice(self, site: surgery.Site) -> None:
        for name in ("key", "value"):
            site.port(name).feed(Times(site.width, 1.0), name=self.name)


def test_one_module_may_serve_two_ports_of_a_fused_projection() -> None:
    x, one, two = inputs("gpt2"), build("gpt2"), build("gpt2")
    surgery.splice(one, Twice())
    surgery.splice(two, Fed())
    for model in (one, two):
        with torch.no_grad():
            for _, parameter in surgery.spliced_parameters(model):
                parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel()))
    torch.testing.assert_close(logits(one, x), logits(two, x), rtol=0, atol=1e-6)


def test_a_splice_brings_no_buffers_of_its_own() -> None:
    """Nothing that a graph needs may be left undefined by ``to_empty`` or a state dict."""
    model = build("gpt2")
    before = [name for name, _ in model.named_buffers()]
    surgery.splice(model, [surgery.method("ssl"), Fed()])
    assert [name for name, _ in model.named_buffers()] == before


@pytest.mark.parametrize("grad", [True, False])
def test_under_autocast_the_logsumexp_is_that_of_the_cast_scores(grad: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 16) * 3 for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        context, lse = attention(q, k, v)
        assert torch.equal(context, F.scaled_dot_product_attention(q, k, v))
    cast_q, cast_k = q.bfloat16().double(), k.bfloat16().double()
    expected = (cast_q @ cast_k.mT / 4).logsumexp(-1)
    torch.testing.assert_close(lse.double(), expected, rtol=0, atol=1e-4)


def test_a_second_adapter_is_loaded_beside_the_first(tmp_path: Path) -> None:
    x = inputs("gpt2")
    folders = []
    for name, rank in (("one", 2), ("two", 3)):
        model = build("gpt2")
        surgery.splice(model, surgery.method("lora", rank=rank), name=name)
        surgery.freeze_base(model, keep=[f"transformer.h.{rank - 2}.ln_1"])
        perturb(model)
        folders.append(surgery.save(model, tmp_path / name))
    both, expected = build("gpt2"), build("gpt2")
    for folder, (name, rank) in zip(folders, (("one", 2), ("two", 3)), strict=True):
        surgery.load(both, folder)
        alone = surgery.load(build("gpt2"), folder)
        surgery.splice(expected, surgery.method("lora", rank=rank), name=name)
        with torch.no_grad():
            for key, parameter in surgery.spliced_parameters(alone, name):
                expected.get_parameter(key).copy_(parameter)
            for key in kept_parameters(alone):
                expected.get_parameter(key).copy_(alone.get_parameter(key))
    assert torch.equal(logits(both, x), logits(expected, x))
    assert [report.name for report in surgery.summary(both).reports] == ["one", "two"]
    again = surgery.load(build("gpt2"), surgery.save(both, tmp_path / "both"))
    assert torch.equal(logits(again, x), logits(both, x))
    names = {name.removesuffix(".weight") for name in kept_parameters(both)}
    assert {"transformer.h.0.ln_1", "transformer.h.1.ln_1"} <= names


def test_an_adapter_can_be_read_by_those_who_may_read_new_files(tmp_path: Path) -> None:
    model = build("gpt2")
    surgery.splice(model, surgery.method("lora"))
    folder = surgery.save(model, tmp_path / "adapter")
    (tmp_path / "new").touch()
    modes = {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
    assert modes == {stat.S_IMODE((tmp_path / "new").stat().st_mode)}


def test_a_block_that_is_wrapped_can_be_edited_inside() -> None:
    x, model = inputs("roberta"), build("roberta")
    surgery.splice(model, surgery.method("ffn_adapter", placement="block", rank=2))
    surgery.splice(model, surgery.method("lora", ports=("up",)), name="b")
    other = build("roberta")
    surgery.splice(other, surgery.method("lora", ports=("up",)), name="b")
    surgery.splice(other, surgery.method("ffn_adapter", placement="block", rank=2))
    perturb(model)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(model, x), logits(other, x), rtol=0, atol=1e-6)


def test_a_splice_that_only_a_part_knows_of_is_in_the_way() -> None:
    model = build("gpt2")
    x = inputs("gpt2")
    surgery.splice(model.transformer, surgery.method("lora"), example_inputs=x)
    for name in ("default", "second"):  # it would neither train nor save the first
        with pytest.raises(SpliceError, match="already spliced under the name 'default'"):
            surgery.splice(model, surgery.method("inducer"), name=name)
    assert surgery.summary(model.transformer).inserted
    surgery.remove(model.transformer)
    surgery.splice(model, surgery.method("inducer"), name="second")


def held(structure: Any, seen: set[int]) -> list[Tensor]:
    """The tensors that an object refers to, through dataclasses and containers."""
    if id(structure) in seen:
        return []
    seen.add(id(structure))
    if isinstance(structure, Tensor):
        return [structure]
    if isinstance(structure, dict):
        parts = list(structure.values())
    elif isinstance(structure, (list, tuple, set, frozenset)):
        parts = list(structure)
    else:
        parts = list(vars(structure).values()) if hasattr(structure, "__dict__") else []
    return [tensor for part in parts for tensor in held(part, seen)]


@pytest.mark.parametrize("name", ["lora", "prompt"])
def test_a_record_keeps_nothing_of_the_example(name: str) -> None:
    model = build("gpt2")
    report = surgery.splice(model, surgery.method(name))
    sites = [inserted.site for inserted in report.inserted]
    assert held(sites, {id(model)}) == []


def test_sites_may_be_a_list_or_a_slice() -> None:
    model = build("gpt2")
    sites = surgery.locate(model).attention
    assert len(surgery.splice(model, surgery.method("lora"), at=sites[:1]).sites) == 1
    report = surgery.splice(model, surgery.method("lora"), at=list(sites)[1:], name="b")
    assert len(report.sites) == len(sites) - 1
    with pytest.raises(SurgeryError, match=r"Take it from surgery.locate"):
        surgery.splice(model, surgery.method("lora"), at=report.sites, name="c")


@dataclass(frozen=True)
class Greedy(Scaled):
    name = "greedy"

    def splice(self, site: surgery.Site) -> None:
        site.port("output").add(Times(site.width, 0.0), name="greedy", reads=("input", "output"))


def test_a_module_with_another_signature_is_named() -> None:
    with pytest.raises(SpliceError, match="the forward fails with greedy spliced in"):
        surgery.splice(build("gpt2"), Greedy())


def either(module: Any, query: Tensor, key: Tensor, value: Tensor, plain: bool) -> Tensor:
    if plain:
        return torch.softmax(query @ key.mT, -1) @ value
    return F.scaled_dot_product_attention(query, key, value, scale=1.0)


def test_a_function_may_use_sdpa_in_one_branch_and_a_softmax_in_another() -> None:
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    both = with_lse(either)
    for plain in (False, True):
        _, lse = both(None, q, k, v, plain)
        torch.testing.assert_close(lse, (q @ k.mT).logsumexp(-1))


@pytest.mark.parametrize("name", ["lora", "prompt", "inducer"])
def test_hooks_of_the_user_do_not_fire_in_a_splice(name: str) -> None:
    model, fired = build("gpt2"), list[int]()
    model.transformer.h[0].mlp.register_forward_hook(lambda *_: fired.append(1))
    surgery.splice(model, surgery.method(name))
    assert not fired
    logits(model, inputs("gpt2"))
    assert fired


def interleaved() -> Any:
    """A model whose fused projection has the queries, keys and values of each head side by side."""
    torch.manual_seed(0)
    config = tr.GPTNeoXConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    return tr.GPTNeoXForCausalLM(config).eval()


@pytest.mark.parametrize("first", ["inference", "export"])
def test_a_graph_captured_in_some_mode_serves_all_others(first: str) -> None:
    model, ids = interleaved(), torch.randint(0, 60, (2, 7))
    surgery.splice(model, methods(("lora", {"ports": ("query", "value")}), ("ia3", {})))
    perturb(model, 0.3)
    expected = copy.deepcopy(model)(input_ids=ids).logits
    other = {"input_ids": ids, "output_attentions": False}  # a call of another structure
    if first == "inference":
        with torch.inference_mode():
            model(**other)
    else:
        torch.export.export(model, (), other, strict=False)
    logits = model(**other).logits
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    assert all(p.grad is not None for _, p in surgery.spliced_parameters(model))


def test_merging_the_last_splice_forgets_rows_too() -> None:
    x, model = inputs("gpt2"), build("gpt2")
    surgery.splice(model, surgery.method("lora"))
    surgery.freeze_base(model)
    surgery.train_rows(model, "transformer.wte.weight", [7])
    surgery.merge(model)
    model.requires_grad_(True)
    assert rows_with_gradient(model, x) > 1


def test_freezing_says_which_rows_it_forgot() -> None:
    model = build("gpt2")
    surgery.splice(model, surgery.method("lora"))
    surgery.train_rows(model, "transformer.wte.weight", [7])
    shown = repr(surgery.freeze_base(model))
    assert "trained no more of transformer.wte.weight: call surgery.train_rows again" in shown


def test_a_text_is_no_truth_value() -> None:
    with pytest.raises(surgery.MethodError, match=r"lora.*bias='no' must be True or False"):
        surgery.method("lora", bias="no")


@dataclass(frozen=True)
class Other:
    """No method at all."""


def test_a_plugin_that_offers_something_else_is_told_so() -> None:
    class Plugin:
        @surgery.hookimpl
        def register_methods(self, register: Any) -> None:
            register(Other)
            register(Twice)

    with pytest.raises(surgery.MethodError, match="Other"):
        Registry().add(Plugin(), "odd")


def test_two_methods_of_one_name_in_one_plugin_clash() -> None:
    @dataclass(frozen=True)
    class Again(Twice):
        name = "twice"

    class Plugin:
        @surgery.hookimpl
        def register_methods(self, register: Any) -> None:
            register(Twice)
            register(Again)

    with pytest.raises(surgery.MethodError, match="'both' offers 2 methods 'twice': Twice, Again"):
        Registry().add(Plugin(), "both")
