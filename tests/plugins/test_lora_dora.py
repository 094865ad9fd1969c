"""DoRA against the equation with dense weights, and its folds beside other updates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from tests.support.models import build, inputs, logits, perturb

IDS = torch.arange(14).reshape(2, 7) + 3


def run(model: Any) -> Tensor:
    out: Tensor = model(input_ids=IDS).logits
    return out


def dense(model: Any, report: Any, base: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the weights m (W + s A B) / ||W + s A B||, its norm a constant, and their leaves."""
    leaves = {n: p.detach().clone().requires_grad_() for n, p in surgery.spliced_parameters(model)}
    weights = {n: p.detach() for n, p in base.named_parameters()}
    for i in report.inserted:
        port = i.site.port(i.edit.port)
        a, b, m = (leaves[f"{i.path}.{name}"] for name in ("a", "b", "magnitude"))
        stored = base.get_parameter(port.weight).detach()
        w = stored.T if port.transposed else stored
        columns = list(range(w.shape[1]) if port.columns is None else port.columns)
        v = w[:, columns] + 2.0 * torch.einsum("ri,ro->io", a, b)
        norm = v.detach().square().sum(0).sqrt()
        now = weights[port.weight].T if port.transposed else weights[port.weight]
        now = now.index_copy(1, torch.tensor(columns), m * v / norm)
        weights[port.weight] = now.T if port.transposed else now
    return weights, leaves


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_outputs_and_gradients_are_those_of_the_equation(name: str) -> None:
    model, base = build(name), build(name)
    report = surgery.splice(model, surgery.method("dora", rank=2, alpha=4.0, ports="all"))
    assert torch.equal(run(model), run(base))
    surgery.freeze_base(model)
    perturb(model, 0.3)
    weights, leaves = dense(model, report, base)
    expected = torch.func.functional_call(base, weights, (), {"input_ids": IDS}).logits
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(expected.square().sum(), list(leaves.values()))
    run(model).square().sum().backward()
    for (path, parameter), grad in zip(surgery.spliced_parameters(model), grads, strict=True):
        scale = float(grad.abs().max())
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-4 * scale, msg=path)


def test_it_counts_the_magnitudes() -> None:
    model = build("llama")
    report = surgery.splice(model, surgery.method("dora", rank=3, ports=("query",)))
    assert [i.parameters for i in report.inserted] == [3 * (32 + 32) + 32] * 2


def test_the_ports_of_a_fused_projection_may_share_a() -> None:
    model = build("gpt2")
    report = surgery.splice(model, surgery.method("dora", rank=2, fused=True))
    first, second = (model.get_submodule(i.path) for i in report.inserted[:2])
    assert first.a is second.a
    assert first.magnitude is not second.magnitude


@pytest.mark.parametrize("order", [("dora", "lora"), ("lora", "dora"), ("dora", "bitfit")])
def test_it_merges_beside_other_updates_of_the_same_projection(order: tuple[str, str]) -> None:
    """c stays that of the base's weight, whatever else is folded into it."""
    model, base = build("gpt2"), build("gpt2")
    surgery.splice(model, [surgery.method(name) for name in order])
    perturb(model, 0.3)
    tuned = run(model)
    merged = surgery.merge(model)
    torch.testing.assert_close(run(model), tuned, rtol=1e-5, atol=1e-5)
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    merged.undo(model)
    assert torch.equal(run(model), run(base))


@pytest.mark.parametrize("order", [("dora", "lora"), ("lora", "dora")])
def test_what_would_change_its_norms_is_not_merged_alone(order: tuple[str, str]) -> None:
    model = build("llama")
    for name in order:
        surgery.splice(model, surgery.method(name), name=name)
    perturb(model, 0.3)
    tuned = run(model)
    with pytest.raises(surgery.SpliceError, match=r"'dora' (stands|reads the bias).* and stays"):
        surgery.merge(model, "lora")
    assert torch.equal(run(model), tuned)
    surgery.merge(model)
    torch.testing.assert_close(run(model), tuned, rtol=1e-5, atol=1e-5)


def test_a_column_of_zeros_stays_finite() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[3] = 0
    base = run(model)
    surgery.splice(model, surgery.method("dora"))
    assert torch.equal(run(model), base)
    run(model).square().sum().backward()
    assert all(p.grad.isfinite().all() for _, p in surgery.spliced_parameters(model))


def test_in_half_precision_it_starts_exact_and_trains_in_float32() -> None:
    model = build("llama").bfloat16()
    base = run(model)
    surgery.splice(model, surgery.method("dora", ports="all"))
    assert torch.equal(run(model), base)
    assert {p.dtype for _, p in surgery.spliced_parameters(model)} == {torch.float32}


def test_sites_without_a_linear_projection_are_refused() -> None:
    model = build("vit")
    sites = surgery.locate(model).convolution
    with pytest.raises(surgery.SurgeryError, match="dora"):
        surgery.splice(model, surgery.method("dora", ports="all"), at=sites)


def test_a_layer_without_a_plain_matrix_is_refused_by_name() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight * 2, self.bias)

    model = build("bert")
    own = model.bert.encoder.layer[0].attention.self
    other = Doubled(32, 32)
    other.load_state_dict(own.query.state_dict())
    own.query = other
    before = logits(model, inputs("bert"))
    with pytest.raises(surgery.PortError, match="no plain matrix makes it"):
        surgery.splice(model, surgery.method("dora"))
    assert torch.equal(logits(model, inputs("bert")), before)


def test_a_copy_reads_its_own_base() -> None:
    model = build("llama")
    surgery.splice(model, surgery.method("dora"))
    perturb(model, 0.3)
    tuned = run(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.add_(1.0)
    assert torch.equal(run(other), tuned)
    assert not torch.equal(run(model), tuned)
