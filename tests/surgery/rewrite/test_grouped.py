"""Splices of one kind run as one edit under a route: the same outputs, one graph, few operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import surgery
from tests.support.models import build, inputs, logits, perturb

SPLICES = {
    "a": surgery.method("lora", rank=2),
    "b": surgery.method("lora", rank=3, alpha=7.0, ports="all"),
    "scale": surgery.method("ia3"),
    "other": surgery.method("ia3", ports=("key",)),
    "c": surgery.method("lora", rank=1, bias=True, ports=("query", "up")),
    "d": surgery.method("lora", rank=2, ports=("value", "output")),
}


def adapted(kind: str, splices: dict[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    model = build(kind)
    for name, method in splices.items():
        surgery.splice(model, method, name=name, example_inputs=inputs(kind))
    perturb(model, 0.3)
    return model.double(), inputs(kind, batch=6)


def alone(model: nn.Module, given: dict[str, Tensor], names: Any, row: int) -> Tensor:
    with surgery.using(model, names or []):
        return logits(model, {k: x[row : row + 1] for k, x in given.items()})


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {kind: adapted(kind, SPLICES) for kind in ("llama", "gpt2")}


NAMES = st.sampled_from([*SPLICES])
ENTRY = st.one_of(
    st.none(),
    NAMES,
    st.lists(NAMES, min_size=1, max_size=4, unique=True),
    st.dictionaries(NAMES, st.sampled_from([0.5, 1.0, -1.5]), max_size=3),
)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@given(route=st.lists(ENTRY, min_size=6, max_size=6))
@example(route=[["a", "b"], None, None, None, None, None])
@example(route=["a", "b", None, None, None, None])
@pytest.mark.few(1)
def test_rows_are_what_their_splices_make_alone(
    models: dict[str, Any], kind: str, route: list[Any]
) -> None:
    model, given = models[kind]
    with surgery.route(route, model):
        together = logits(model, given)
    for row, names in enumerate(route):
        expected = alone(model, given, names, row)
        torch.testing.assert_close(together[row : row + 1], expected, rtol=1e-9, atol=1e-9)


def loras(count: int) -> dict[str, Any]:
    return {f"n{i}": surgery.method("lora", rank=2, ports="all") for i in range(count)}


def test_one_graph_serves_every_route() -> None:
    model, given = adapted("llama", loras(5))
    known = set[int]()
    for i in range(12):
        draw = torch.Generator().manual_seed(i)
        names = [f"n{int(n)}" for n in torch.randint(0, 5, (6,), generator=draw)]
        with surgery.route([*names[:5], None], model):
            logits(model, given)
        known.add(sum(len(found) for found in surgery.variants(model).values()))
    assert len(known) == 1


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func.overloadpacket.__name__ in ("bmm", "baddbmm", "mm", "addmm")
        return func(*args, **(kwargs or {}))


def test_more_adapters_cost_no_more_products() -> None:
    products = []
    for count in (2, 6):
        model, given = adapted("llama", loras(count))
        with surgery.route([f"n{i % count}" for i in range(6)], model):
            logits(model, given)
            with Counter() as counter:
                logits(model, given)
        products.append(counter.products)
    assert products[0] == products[1]


def test_adapters_that_cannot_run_as_one_run_one_after_the_other() -> None:
    """A hook sees the output of its own module; dropout and dtypes may differ."""
    model, given = adapted("llama", loras(3))
    route = ["n0", "n1", None, "n2", "n1", "n0"]
    with surgery.route(route, model):
        expected = logits(model, given)
    seen: list[int] = []
    hooked = next(m for n, m in model.named_modules() if n.endswith("n1_lora_query"))
    handle = hooked.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    with surgery.route(route, model):
        torch.testing.assert_close(logits(model, given), expected, rtol=1e-9, atol=1e-9)
    assert seen == [2]  # its two rows, in one call
    handle.remove()
    for name, parameter in model.named_parameters():
        if "n0_lora" in name:
            parameter.data = parameter.data.float()
    with surgery.route(route, model):
        found = logits(model, given)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    same = [i for i, name in enumerate(route) if name != "n0"]  # in float64 as before
    torch.testing.assert_close(found[same], expected[same], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_has_groups_in_float32(dtype: torch.dtype) -> None:
    model = build("llama").to(dtype)
    given = inputs("llama", batch=4)
    for name, method in {"a": SPLICES["a"], "b": SPLICES["b"], "scale": SPLICES["scale"],
                         "other": SPLICES["other"]}.items():  # fmt: skip
        surgery.splice(model, method, name=name)
    perturb(model, 0.3)
    route = ["a", ["b", "scale"], "other", None]
    with surgery.route(route, model):
        together = logits(model, given)
    assert together.dtype == dtype
    for row, names in enumerate(route):
        expected = alone(model, given, names, row)
        torch.testing.assert_close(together[row : row + 1], expected, rtol=0.05, atol=0.05)


def test_few_adapters_with_many_rows_each_run_once_each() -> None:
    model, given = adapted("llama", loras(2))
    route = ["n0", "n1", "n1"] * 6
    many = {k: x.repeat(3, 1) for k, x in given.items()}
    with surgery.route(route, model):
        together = logits(model, many)
    for row, name in enumerate(route):
        part = {k: x[row : row + 1] for k, x in many.items()}
        torch.testing.assert_close(together[row : row + 1], alone(model, part, name, 0))


def test_a_factor_of_virtual_keys_counts_in_a_route_as_alone() -> None:
    """A later method reads the lse, which counts the keys of the prefix by their factor."""
    model = build("llama")
    surgery.splice(model, surgery.method("prefix", length=2), name="p")
    surgery.splice(model, surgery.method("inducer", key_rank=2, value_rank=2), name="n")
    perturb(model, 0.3)
    model, given = model.double(), inputs("llama", batch=4)
    route = [{"p": 0.5, "n": 1.0}, {"n": 1.0}, {"p": 1.0, "n": 1.0}, {"p": -0.5, "n": 1.0}]
    with surgery.route(route, model):
        together = logits(model, given)
    for row, names in enumerate(route):
        expected = alone(model, given, names, row)
        torch.testing.assert_close(together[row : row + 1], expected, rtol=0, atol=1e-5)


def test_hooks_and_forwards_of_a_module_run_also_in_a_group() -> None:
    model, given = adapted("llama", loras(2))
    module: Any = next(m for n, m in model.named_modules() if n.endswith("n1_lora_query"))
    seen: list[str] = []
    module.register_full_backward_hook(lambda *_: seen.append("backward"))
    with surgery.route(["n0", "n1", "n0", "n1", "n0", None], model):
        logits(model, given).sum().backward()
    assert "backward" in seen
    own = module.forward
    module.forward = lambda *args, **kwargs: seen.append("forward") or own(*args, **kwargs)
    with surgery.route(["n0", "n1", "n0", "n1", "n0", None], model):
        logits(model, given)
    assert "forward" in seen


@pytest.mark.parametrize("names", [["n0", "n1"], ["n0", None]])
def test_a_batch_with_too_few_rows_is_refused(names: list[Any]) -> None:
    model, given = adapted("llama", loras(2))
    one = {k: x[:1] for k, x in given.items()}
    with surgery.route(names, model), pytest.raises(surgery.ForwardError, match="2 entries"):
        logits(model, one)


def test_gradients_reach_every_adapter_of_a_batch() -> None:
    model, given = adapted("llama", loras(3))
    route = ["n0", "n1", None, "n2", "n1", "n0"]
    with surgery.route(route, model):
        logits(model, given).square().sum().backward()
    together = [p.grad for _, p in surgery.spliced_parameters(model)]
    model.zero_grad()
    for row, name in enumerate(route):
        alone(model, given, name, row).square().sum().backward()
    for a, (_, parameter) in zip(together, surgery.spliced_parameters(model), strict=True):
        torch.testing.assert_close(a, parameter.grad, rtol=1e-8, atol=1e-8)
