"""What a compiled model gets to compile for LoRA on every projection: counts of operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from transformers import StaticCache

import surgery
from tests.support.models import build, inputs, perturb


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counted:
    """A backend that runs what AOTAutograd made, and counts the operators of each graph."""

    def __init__(self) -> None:
        self.graphs: list[Counter[str]] = []

    def _keep(self, graph: fx.GraphModule, examples: Any) -> Any:
        names = (str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        self.graphs.append(Counter(name.split(".")[1] for name in names if "aten." in name))
        return make_boxed_func(graph.forward)

    def backend(self) -> Any:
        return aot_autograd(fw_compiler=self._keep)


def spliced(alpha: float) -> tuple[nn.Module, int]:
    """Return a model with LoRA on every projection, and the number of inserted modules."""
    model = build("llama").eval()
    surgery.splice(model, surgery.method("lora", rank=2, alpha=alpha, ports=("all",)))
    surgery.freeze_base(model)
    perturb(model, 0.1)
    return model, len(list(surgery.spliced_parameters(model))) // 2


def step(model: Any) -> tuple[list[Counter[str]], Any]:
    """Return the operators of the graphs of a training step, and the gradients of its parameters.

    The embeddings require a gradient, so the backward pass of a frozen base runs through it, too.
    """
    counted = Counted()
    ids = inputs("llama")["input_ids"]
    given = model.get_input_embeddings()(ids).detach().requires_grad_()
    compiled = torch.compile(model, fullgraph=True, backend=counted.backend())
    trained = [given, *(p for p in model.parameters() if p.requires_grad)]
    found = torch.autograd.grad(compiled(inputs_embeds=given, use_cache=False)[0].sum(), trained)
    expected = torch.autograd.grad(model(inputs_embeds=given, use_cache=False)[0].sum(), trained)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    return counted.graphs, found


def products(graph: Counter[str]) -> int:
    return graph["mm"] + graph["addmm"]


@pytest.mark.parametrize("alpha", [2.0, pytest.param(6.0, marks=pytest.mark.slow)])
def test_a_training_step_has_the_products_of_each_module_and_concatenates_nothing(
    alpha: float,
) -> None:
    base = build("llama").eval().requires_grad_(False)
    plain, _ = step(base)
    model, modules = spliced(alpha)
    graphs, _ = step(model)
    assert len(graphs) == len(plain) == 2  # a forward and a backward
    for ours, theirs, each in zip(graphs, plain, (2, 4), strict=True):
        assert products(ours) == products(theirs) + each * modules
        assert ours["cat"] == theirs["cat"]
        scales = modules if alpha != 2.0 else 0  # alpha / rank
        assert ours["mul"] == theirs["mul"] + scales


def test_a_token_with_a_static_cache_is_one_graph_with_two_products_a_module() -> None:
    found = []
    base = build("llama").eval()
    model, modules = spliced(6.0)
    ids = inputs("llama")["input_ids"]
    for candidate in (base, model):
        counted = Counted()
        compiled = torch.compile(candidate, fullgraph=True, backend=counted.backend())
        caches = [StaticCache(config=candidate.config, max_cache_len=32) for _ in range(2)]
        with torch.no_grad():
            for cache in caches:
                candidate(input_ids=ids, past_key_values=cache, use_cache=True)
            token = ids[:, :1].clone()
            for _ in range(3):
                out = compiled(input_ids=token, past_key_values=caches[0], use_cache=True).logits
                want = candidate(input_ids=token, past_key_values=caches[1], use_cache=True).logits
                torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
                token = want[:, -1].argmax(-1, keepdim=True)
        assert len(counted.graphs) == 1
        found.append(counted.graphs[0])
    plain, ours = found
    assert products(ours) == products(plain) + 2 * modules
    assert {name: ours[name] for name in ("cat", "mul")} == {
        name: plain[name] for name in ("cat", "mul")
    }


def test_modules_that_share_a_factor_share_its_product() -> None:
    model = build("gpt2").eval()
    ports = ("query", "key", "value")
    surgery.splice(model, surgery.method("lora", rank=2, ports=ports, fused=True))
    plain, counted = Counted(), Counted()
    with torch.no_grad():
        for candidate, seen in ((build("gpt2").eval(), plain), (model, counted)):
            torch.compile(candidate, fullgraph=True, backend=seen.backend())(**inputs("gpt2"))
    layers = model.config.n_layer
    assert products(counted.graphs[0]) == products(plain.graphs[0]) + (1 + 3) * layers
