"""torch.compile and torch.export of a spliced model."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama as llama

import surgery
from surgery.host import selection
from tests.support.forwards import Attention, pair, tokens
from tests.support.models import build, perturb

CASES = [("gpt2", "sdpa"), ("llama", "sdpa"), ("llama", "eager"), ("roberta", "sdpa")]
slow = pytest.mark.slow  # a compilation takes seconds: what repeats one for another model


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its own parts
        yield


class Counted:
    """A backend that runs what Dynamo found as it is, and counts how often it was asked."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: Any, examples: Any) -> Any:
        self.graphs += 1
        return module.forward


def spliced(name: str, implementation: str = "sdpa", dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    model = build(name).eval()
    model.set_attn_implementation(implementation)
    methods = [
        surgery.method("inducer", key_rank=2, value_rank=2, dropout=dropout),
        surgery.method("lora", rank=2, dropout=dropout),
    ]
    surgery.splice(model, methods)
    with torch.no_grad():
        for _, parameter in surgery.spliced_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def call(model: Any, name: str, n: int = 7) -> Tensor:
    ids = (torch.arange(2 * n) % 50 + 3).reshape(2, n)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    cache = {} if name == "roberta" else {"use_cache": False}
    output: Tensor = model(input_ids=ids, attention_mask=mask, **cache)[0]
    return output


@pytest.mark.parametrize(
    ("name", "implementation"),
    [*CASES[:2], *(pytest.param(*case, marks=slow) for case in CASES[2:])],
)
@pytest.mark.few(1)
def test_one_graph_for_a_forward_that_was_never_run_before(name: str, implementation: str) -> None:
    model = spliced(name, implementation)
    backend = Counted()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert torch.allclose(call(compiled, name), call(model, name), atol=1e-6)
    assert backend.graphs == 1


@pytest.mark.parametrize(
    ("name", "implementation"),
    [CASES[0], *(pytest.param(*case, marks=slow) for case in CASES[1:3])],
)
def test_gradients_of_a_compiled_model_are_those_of_a_plain_one(
    name: str, implementation: str
) -> None:
    model = spliced(name, implementation)
    parameters = [p for _, p in surgery.spliced_parameters(model)]

    def gradients(forward: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(forward, name).pow(2).mean(), parameters)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled), gradients(model), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6 * b.abs().max().item())


@slow
def test_other_lengths_add_one_graph_and_switching_adds_none_again() -> None:
    model = spliced("llama")
    backend = Counted()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for n in (5, 6, 7, 9, 12, 13):
        assert torch.allclose(call(compiled, "llama", n), call(model, "llama", n), atol=1e-6)
    assert backend.graphs <= 2  # the first length, and then any
    counts = []
    for _ in range(3):
        with surgery.disabled(model):
            assert torch.allclose(call(compiled, "llama"), call(model, "llama"), atol=1e-6)
        assert torch.allclose(call(compiled, "llama"), call(model, "llama"), atol=1e-6)
        counts.append(backend.graphs)
    assert counts[0] == counts[-1]


def test_a_model_that_was_compiled_before_follows_splice_and_remove() -> None:
    model = build("gpt2").eval()
    compiled = torch.compile(model, fullgraph=True, backend=Counted())
    before = call(compiled, "gpt2")
    surgery.splice(model, surgery.method("inducer", key_rank=2, value_rank=2))
    with torch.no_grad():
        for _, parameter in surgery.spliced_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.3)
    moved = call(compiled, "gpt2")
    assert not torch.equal(moved, before)
    assert torch.allclose(moved, call(model, "gpt2"), atol=1e-6)
    surgery.remove(model)
    assert torch.equal(call(compiled, "gpt2"), before)


@slow
def test_compiled_training_draws_other_masks_each_time() -> None:
    model = spliced("llama", dropout=0.3).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first, second = (call(compiled, "llama").detach() for _ in range(2))
    assert not torch.equal(first, second)


@slow
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_through_a_compiled_forward(cache: str | None) -> None:
    model: Any = spliced("llama")
    ids = torch.arange(3, 17).reshape(2, 7)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    options |= {"cache_implementation": cache} if cache else {}
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(**given, **options)
    backend = Counted()
    model.forward = torch.compile(model.forward, backend=backend)
    assert torch.equal(model.generate(**given, **options), expected)
    seen = backend.graphs
    assert torch.equal(model.generate(**given, **options), expected)
    assert backend.graphs <= seen + 1 <= 5  # prefill and decoding, not one per token


@slow
@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_inductor(name: str, implementation: str) -> None:
    model = spliced(name, implementation)
    compiled = torch.compile(model, fullgraph=True)
    assert torch.allclose(call(compiled, name), call(model, name), atol=1e-5)


METHODS = [
    surgery.method("lora", rank=2),
    pytest.param(surgery.method("prompt", length=3), marks=slow),
    *(
        pytest.param(surgery.method(name, **options), marks=slow)
        for name, options in {"prefix": {"length": 3}, "inducer": {}, "ffn_adapter": {}}.items()
    ),
]


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=slow)])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_export(method: Any, strict: bool) -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = build("llama").eval()
            surgery.splice(self.model, method)
            perturb(self.model)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            logits: Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
            return logits

    wrapped, file = Logits(), io.BytesIO()
    given = torch.arange(3, 17).reshape(2, 7), torch.ones(2, 7, dtype=torch.long)
    sizes = dict.fromkeys((0, 1), torch.export.Dim.AUTO)
    exported = torch.export.export(wrapped, given, dynamic_shapes=(sizes, sizes), strict=strict)
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    longer = torch.arange(3, 14).reshape(1, 11), torch.ones(1, 11, dtype=torch.long)
    for call in (given, longer):
        torch.testing.assert_close(loaded(*call), wrapped(*call), rtol=0, atol=1e-6)


@slow
@pytest.mark.parametrize("grad", [True, False])
def test_a_prompt_compiles_to_one_graph(grad: bool) -> None:
    model = build("llama").eval()
    surgery.splice(model, surgery.method("prompt", length=3))
    backend, ids = Counted(), torch.arange(3, 17).reshape(2, 7)
    with torch.set_grad_enabled(grad):
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for _ in range(2):  # without a cache, the prompt's own run is another call than the tokens'
            found = compiled(input_ids=ids, use_cache=False).logits
            expected = model(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert backend.graphs == 1


@pytest.mark.parametrize("grad", [True, pytest.param(False, marks=slow)])
@pytest.mark.parametrize("gate", [True, pytest.param(False, marks=slow)])
def test_virtual_tokens_compile_with_and_without_gradients(grad: bool, gate: bool) -> None:
    torch.manual_seed(0)
    model = build("gpt2").eval()
    surgery.splice(model, surgery.method("prefix", length=4, gate=gate))
    with torch.no_grad():
        for _, parameter in surgery.spliced_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.3)
    with torch.set_grad_enabled(grad):
        expected = call(model, "gpt2")
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            torch.testing.assert_close(call(compiled, "gpt2"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=slow)])
def test_a_decoder_with_a_mask_and_its_own_cache_is_one_graph(name: str) -> None:
    model = spliced(name)
    ids = torch.arange(14).reshape(2, 7) + 3
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    more = {"input_ids": ids[:, :1], "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        cache, expected = compiled(**given).past_key_values, model(**given).past_key_values
        assert torch.allclose(cache.layers[1].keys, expected.layers[1].keys, atol=1e-6)
        after = compiled(**more, past_key_values=cache).logits
        assert torch.allclose(after, model(**more, past_key_values=expected).logits, atol=1e-6)


def test_each_of_many_states_is_one_graph() -> None:
    model = build("llama").eval()
    for name in "abcd":
        surgery.splice(model, surgery.method("lora", rank=2), name=name)
    with torch.no_grad():
        for _, parameter in surgery.spliced_parameters(model):
            parameter.normal_()
    backend, counts = Counted(), []
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for _ in range(3):
            for kept in "abcd":
                with contextlib.ExitStack() as stack:
                    for other in set("abcd") - {kept}:
                        stack.enter_context(surgery.disabled(model, other))
                    expected = call(model, "llama")
                    assert torch.allclose(call(compiled, "llama"), expected, atol=1e-5)
            counts.append(backend.graphs)
    assert counts == [4, 4, 4]


def test_a_function_that_is_replaced_after_the_compilation_is_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = spliced("llama")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        before = call(compiled, "llama")
        with monkeypatch.context() as patch:
            patch.setattr(llama, "apply_rotary_pos_emb", lambda q, k, *_, **__: (2 * q, k))
            changed = call(compiled, "llama")
            assert not torch.allclose(changed, before, atol=1e-3)
            assert torch.allclose(changed, call(model, "llama"), atol=1e-6)
        assert torch.equal(call(compiled, "llama"), before)


class Named(Attention):
    """Reads one of its strings, and passes another on."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = KeptWhole()

    def forward(self, x: Tensor, mode: str = "plain", tag: str = "", **options: Any) -> Tensor:
        y = super().forward(x) if mode != "twice" else 2 * super().forward(x)
        return y + self.kept(x, tag)


class KeptWhole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(16, 16)

    def forward(self, x: Tensor, tag: str) -> Tensor:
        y: Tensor = self.map(x) * len(tag)
        return y


@slow
@torch.no_grad()
def test_strings_and_dropped_graphs_in_a_compiled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    base, model = pair(Named)
    monkeypatch.setattr(selection, "KEPT", 5)
    compiled = torch.compile(model, backend=Counted())
    for n in range(7):
        for mode in ("plain", "twice"):
            given: Any = {"mode": mode, "tag": "t" * (n % 4), f"option{n}": None}
            assert torch.equal(compiled(tokens(), **given), base(tokens(), **given))
    assert len(surgery.variants(model)[""]) == 5
