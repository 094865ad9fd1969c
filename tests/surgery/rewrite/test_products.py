"""Low-rank products that several modules share: equal to each module by itself, gradients too."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import surgery
from surgery.rewrite.products import add_product, first_products, split_columns
from surgery.rewrite.side_by_side import side_by_side
from surgery.rewrite.written import leaves, may_be_written
from tests.support.models import build, inputs, perturb

KINDS = ("gpt2", "llama", "bert")
PORTS = ("query", "key", "value", "output", "up", "gate")


@contextmanager
def each_by_itself(model: nn.Module) -> Iterator[None]:
    """Let every inserted module run by itself: a hook must see its call."""
    inserted = {name.rpartition(".")[0] for name, _ in surgery.spliced_parameters(model)}
    hooks = [model.get_submodule(n).register_forward_hook(lambda *_: None) for n in inserted]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def outcome(model: Any, given_: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output of a model under one seed, and all gradients of its parameters."""
    model.zero_grad()
    torch.manual_seed(1)
    out = model(**given_)[0]
    (out.float() * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
    named = surgery.spliced_parameters(model)
    return out.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    ports=st.sets(st.sampled_from(PORTS), min_size=1),
    second=st.sets(st.sampled_from(PORTS)),
    ranks=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    dropout=st.sampled_from([0.0, 0.0, 0.3]),
    bias=st.booleans(),
    fused=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    autocast=st.booleans(),
    share=st.sampled_from([1.0, 0.5]),
    training=st.booleans(),
)
def test_shared_products_are_those_of_each_module(
    kind: str, ports: set[str], second: set[str], ranks: tuple[int, int], dropout: float,
    bias: bool, fused: bool, dtype: torch.dtype, autocast: bool, share: float, training: bool,
) -> None:  # fmt: skip
    """For any ports, ranks, methods beside each other, dtypes and modes."""
    model = build(kind).to(dtype)
    options = {"dropout": dropout, "bias": bias, "fused": fused}
    patterns = {"layer.0|h.0|layers.0": ranks[1]}
    own = tuple(p for p in sorted(ports) if kind == "llama" or p != "gate") or ("query",)
    method = surgery.method("lora", rank=ranks[0], ranks=patterns, ports=own, **options)
    surgery.splice(model, method, name="a")
    if second:
        other = tuple(p for p in sorted(second) if kind == "llama" or p != "gate") or ("value",)
        surgery.splice(model, surgery.method("lora", rank=2, ports=other), name="b")
        surgery.use(model, {"a": share, "b": 1.0})
    perturb(model, 0.3)
    surgery.freeze_base(model)
    model.train(training)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.float32):
        together = outcome(model, inputs(kind))
        with each_by_itself(model):
            alone = outcome(model, inputs(kind))
    assert together[1].keys() == alone[1].keys()
    if dtype != torch.bfloat16 and not autocast:
        torch.testing.assert_close(together[0], alone[0], rtol=2e-4, atol=2e-5)
        assert distance(together[1], alone[1]) < 1e-4
        return
    if dropout == 0:  # masks depend on the dtype
        exact = outcome(copy.deepcopy(model).double(), inputs(kind))
        error, known = distance(together[1], exact[1]), distance(alone[1], exact[1])
        assert error < 2 * known + 0.02  # as much as half precision costs anyway


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return the distance of all gradients together, relative to the length of the wanted ones."""
    gap = sum(((found[n].double() - wanted[n].double()) ** 2).sum() for n in wanted)
    whole = sum((gradient.double() ** 2).sum() for gradient in wanted.values())
    return float(gap**0.5 / (whole**0.5 + 1e-12))


def test_equal_at_the_start_to_the_bit() -> None:
    for kind in KINDS:
        model = build(kind)
        with torch.no_grad():
            before = model(**inputs(kind))[0]
            surgery.splice(model, surgery.method("lora", rank=3, ports=("all",)))
            assert torch.equal(model(**inputs(kind))[0], before)


def products(x: Tensor, *factors: Tensor) -> Tensor:
    parts, passed = first_products(x, factors)
    return torch.cat([*(p for p in parts if p is not None), passed], -1)


def test_gradients_of_gradients() -> None:
    x, a, c, b, y = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True)
        for s in ((2, 3, 4), (2, 4), (3, 4), (2, 5), (2, 3, 5))
    )
    assert torch.autograd.gradcheck(products, (x, a, c))
    assert torch.autograd.gradgradcheck(products, (x, a, c))
    h = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    added: Callable[..., Any] = lambda y, h, b: add_product(y, h, b, 0.7)  # noqa: E731
    assert torch.autograd.gradcheck(added, (y, h, b))
    assert torch.autograd.gradgradcheck(added, (y, h, b))
    split: Callable[..., Any] = lambda y: split_columns(y, [1, 3, 1])  # noqa: E731
    assert torch.autograd.gradcheck(split, (y,))
    assert torch.autograd.gradgradcheck(split, (y,))


def test_transforms_of_torch_pass_through() -> None:
    """``torch.func``, forward mode, ``torch.compile`` and tracing see torch's own operators."""
    x, a, b = torch.randn(4, 6), torch.randn(2, 6, requires_grad=True), torch.randn(2, 5)

    def update(x: Tensor) -> Tensor:
        (h,), passed = first_products(x, [a])
        assert h is not None
        return add_product(passed @ torch.ones(6, 5), h, b, 2.0)

    expected = x @ torch.ones(6, 5) + 2 * x @ a.T @ b
    one = torch.func.vmap(lambda row: update(row[None])[0])(x)
    torch.testing.assert_close(one, expected)
    jacobian = torch.func.jacrev(lambda x: update(x).sum(0))(x)
    torch.testing.assert_close(torch.func.jacfwd(lambda x: update(x).sum(0))(x), jacobian)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(update(dual)).tangent
    torch.testing.assert_close(tangent, update(torch.ones(1, 6)).expand(4, 5))
    a.requires_grad_(False)  # a constant of the trace
    torch.testing.assert_close(torch.jit.trace(update, (x,))(x), expected)
    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_multiplies_in_its_dtype_and_gradients_have_that_of_their_tensors(
    dtype: torch.dtype,
) -> None:
    onto, hidden = torch.randn(2, 3, 5), torch.randn(2, 3, 4)
    tensors = [t.requires_grad_() for t in (onto.to(dtype), hidden.to(dtype), torch.randn(4, 5))]
    with torch.autocast("cpu", torch.bfloat16):
        out = add_product(*tensors, 0.5)  # type: ignore[arg-type]
    out.float().square().sum().backward()
    assert out.dtype == dtype
    assert [t.grad.dtype for t in tensors if t.grad is not None] == [dtype, dtype, torch.float32]


def test_a_module_with_hooks_runs_by_itself() -> None:
    model = build("llama")
    surgery.splice(model, surgery.method("lora", rank=2, ports=("all",)))
    perturb(model, 0.3)
    module = model.model.layers[0].self_attn.lora_key
    seen: list[str] = []
    expected = model(**inputs("llama"))[0]
    hooks = [
        module.register_forward_hook(lambda *_: seen.append("forward")),
        module.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    out = model(**inputs("llama"))[0]
    out.sum().backward()
    torch.testing.assert_close(out, expected)
    assert seen == ["forward", "backward"]
    for hook in hooks:
        hook.remove()
    everywhere = nn.modules.module.register_module_forward_hook(
        lambda m, *_: seen.append("every") if m is module else None
    )
    model(**inputs("llama"))
    everywhere.remove()
    assert seen[2:] == ["every"]


class Doubled(surgery.Method):
    """LoRA whose modules are of a class that overrides forward alone."""

    name = "doubled"

    def splice(self, site: surgery.OpenSite) -> None:
        from surgery_plugins.lora import LowRank

        class Twice(LowRank):
            def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
                return super().forward(2 * x, onto)

        for name in ("query", "key"):
            port = site.port(name)
            port.add(Twice(port.in_width or 0, port.width, 2, 1.0, 0.0, False), name="twice")


def test_a_class_that_overrides_forward_alone_shares_nothing() -> None:
    model = build("llama")
    surgery.splice(model, Doubled())
    perturb(model, 0.3)
    out = model(**inputs("llama"))[0]
    with each_by_itself(model):
        assert torch.equal(model(**inputs("llama"))[0], out)


def test_factors_lie_side_by_side_and_stay_what_they_are() -> None:
    model = build("llama")
    surgery.splice(model, surgery.method("lora", rank=2, ports=("all",)))
    attention = model.model.layers[0].self_attn
    factors = [attention.lora_query.a, attention.lora_key.a, attention.lora_value.a]
    stack = side_by_side(factors, 0)
    assert stack.data_ptr() == factors[0].data_ptr()
    with torch.no_grad():
        factors[1].data = factors[1].data  # what libraries do
        factors[2].fill_(7.0)
    assert torch.equal(side_by_side(factors, 0), torch.cat(factors))
    for moved in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.double()):
        perturb(moved, 0.3)
        out = moved(**inputs("llama"))[0]
        with each_by_itself(moved):
            torch.testing.assert_close(moved(**inputs("llama"))[0], out, rtol=1e-5, atol=1e-5)
    factors = [attention.lora_query.a, attention.lora_key.a, attention.lora_value.a]
    assert side_by_side(factors, 0).data_ptr() == factors[0].data_ptr()  # of the doubles again


@pytest.mark.parametrize(
    ("write", "written"),
    [
        (lambda x: x.mul_(2.0), True),
        (lambda x: x.view(-1).add_(1.0), True),
        (lambda x: F.relu(x, inplace=True), True),
        (lambda x: x.transpose(0, 1).mul(2.0).add_(1.0), False),
        (lambda x: x.__add__(1), False),
    ],
)
def test_a_value_that_is_written_to_is_not_shared(
    write: Callable[[Tensor], Any], written: bool
) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Any:
            y = x + 1
            return write(y), y

    graph = fx.symbolic_trace(Model()).graph
    y = next(node for node in graph.nodes if node.target is operator.add)
    assert may_be_written(y, Model()) is written


class ReturnsInput(nn.Module):
    """An attention that gives back what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return self.o(y), x


def test_a_host_that_returns_its_input_returns_that_object() -> None:
    model, x = ReturnsInput(), torch.randn(2, 5, 8, requires_grad=True)
    surgery.splice(model, surgery.method("lora", rank=2), example_inputs=x)
    assert model(x)[1] is x
    seen = nn.Sequential(nn.Linear(2, 2), nn.Flatten())
    graph = fx.symbolic_trace(seen).graph
    x_node, y, _, _ = graph.nodes
    assert leaves(y) is False  # a module may copy
    assert not leaves(x_node)


def test_a_layer_that_writes_to_its_input_is_known() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(operator.iadd, (x, 1.0))
    assert may_be_written(x, nn.Module())
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))
    graph = fx.symbolic_trace(model).graph
    x, y = list(graph.nodes)[:2]
    assert may_be_written(y, model)
    assert not may_be_written(x, model)
