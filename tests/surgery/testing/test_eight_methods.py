"""Eight methods of the literature, each written from the documentation in at most 45 lines."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.plugin.registry import registry
from surgery.testing import check_method, make_model

NAMES = "my_dora my_vera my_loha head_gate loreft steering adalora talking_heads".split()
IDS = torch.tensor([[3, 4, 5, 6, 7, 8, 9], [13, 4, 15, 26, 17, 8, 9]])
MODULES = {name: importlib.import_module(f"tests.support.eight_methods.{name}") for name in NAMES}


EXEMPT = {"loreft": {"cached": "acts on the last tokens"}}
# of the default shapes, which all hold, each method takes some, so that this file stays quick
SHAPES: dict[str, tuple[Any, ...]] = {
    "my_dora": ("fused",),
    "my_vera": ("encoder",),
    "my_loha": ("grouped",),
    "head_gate": ("grouped",),
    "loreft": ("grouped", "encoder"),
    "steering": ("fused", "encoder"),
    "adalora": ("fused",),
    "talking_heads": ("eager",),
}


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    offered = registry()._offered["method"]
    before = dict(offered)
    for module in MODULES.values():
        module.register_methods(surgery.register)
    yield
    offered.clear()
    offered.update(before)


def spliced(name: str, model: nn.Module) -> list[nn.Module]:
    """Splice a method in, move its parameters, return its modules."""
    report = surgery.splice(model, name)
    surgery.freeze_base(model)
    torch.manual_seed(1)
    for _, parameter in surgery.spliced_parameters(model):
        parameter.data += 0.3 * torch.randn_like(parameter)
    return [model.get_submodule(each.path) for each in report.inserted]


def seen(model: nn.Module, site: surgery.Site, *ports: str, **inputs: Any) -> list[Tensor]:
    with torch.no_grad(), surgery.watch(model, ports, at=[site]) as values:
        model(input_ids=IDS, **inputs)
    return [values[site, port] for port in ports]


def merges(model: nn.Module) -> None:
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        merged = surgery.merge(model)
        assert merged.folded
        assert not merged.left
        torch.testing.assert_close(model(input_ids=IDS).logits, before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_has_at_most_45_lines(name: str) -> None:
    text = Path(str(MODULES[name].__file__)).read_text()
    assert sum(bool(line.strip()) for line in text.splitlines()) <= 45


@pytest.mark.parametrize("name", NAMES)
def test_a_method_keeps_the_contract(name: str) -> None:
    contract = check_method(name, shapes=SHAPES[name], exempt=EXEMPT.get(name))
    assert contract.held
    assert not contract.refused


def dora(m: Any, w: Tensor) -> Tensor:
    moved = w + 2 * m.a @ m.b
    return m.magnitude * moved / moved.pow(2).sum(0).sqrt()


def vera(m: Any, w: Tensor) -> Tensor:
    return w + m.pair.a @ torch.diag(m.d) @ m.pair.b @ torch.diag(m.b)


def loha(m: Any, w: Tensor) -> Tensor:
    return w + torch.einsum("ir,ro,is,so->io", m.a, m.b, m.c, m.d)


def adalora(m: Any, w: Tensor) -> Tensor:
    return w + m.q @ torch.diag(m.l[0]) @ m.p.T


@pytest.mark.parametrize(
    ("name", "dense"),
    [("my_dora", dora), ("my_vera", vera), ("my_loha", loha), ("adalora", adalora)],
)
def test_a_projection_has_the_weight_of_the_equation(name: str, dense: Any) -> None:
    for shape in ("grouped", "fused"):
        model = make_model(shape)
        site = surgery.locate(model).attention[0]
        if shape == "grouped":
            weight, bias = model.model.layers[0].self_attn.q_proj.weight.T, 0
        else:
            fused = model.transformer.h[0].attn.c_attn
            weight, bias = fused.weight[:, :32], fused.bias[:32]
        module = spliced(name, model)[0]
        x, query = seen(model, site, "input", "query")
        with torch.no_grad():
            torch.testing.assert_close(
                query, x @ dense(module, weight) + bias, atol=1e-5, rtol=1e-4
            )
        merges(model)


def test_head_gate_scales_heads() -> None:
    model = make_model("grouped")
    site = surgery.locate(model).attention[0]
    gate = spliced("head_gate", model)[0].gate
    merged, output = seen(model, site, "merged", "output")
    weight = model.model.layers[0].self_attn.o_proj.weight.T
    plain = torch.stack(
        [merged[..., 8 * h : 8 * h + 8] @ weight[8 * h : 8 * h + 8] for h in range(4)]
    )
    with torch.no_grad():
        expected = torch.einsum("hbnd,h->bnd", plain, gate)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
    merges(model)


def test_loreft_edits_the_ends_of_the_prompt() -> None:
    model = make_model("grouped")
    site = surgery.locate(model).block[0]
    real = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    (h,) = seen(model, site, "output", attention_mask=real)
    module: Any = spliced("loreft", model)[0]
    (edited,) = seen(model, site, "output", attention_mask=real)
    with torch.no_grad():
        r = torch.linalg.qr(module.raw).Q.T
        w, b = r + module.moved.weight, module.moved.bias
        torch.testing.assert_close(r @ r.T, torch.eye(4))
        expected = h + (h @ w.T + b - h @ r.T) @ r
    ends = torch.tensor([[0, 1, 1, 0, 0, 1, 1], [1, 1, 0, 0, 0, 1, 1]]).bool()
    torch.testing.assert_close(edited[ends], expected[ends])
    assert torch.equal(edited[~ends & real.bool()], h[~ends & real.bool()])
    with pytest.raises(surgery.SpliceError, match="loreft"):
        surgery.merge(model)


@pytest.mark.parametrize("shape", ["fused", "encoder"])
def test_steering_is_the_difference_of_means(shape: str) -> None:
    model = make_model(shape)
    sites = list(surgery.locate(model).block)
    real = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    batches = [IDS, IDS + 5, IDS.flip(1), IDS + 7]
    given = [{"input_ids": ids, "attention_mask": real} for ids in batches]
    means: list[list[Tensor]] = []
    for site in sites:
        values = []
        for batch in given:
            with torch.no_grad(), surgery.watch(model, "output", at=[site]) as states:
                model(**batch)
            values.append(states[site, "output"][real.bool()])
        means.append([torch.cat(values[0::2]).mean(0), torch.cat(values[1::2]).mean(0)])
    report = surgery.splice(model, surgery.method("steering", scale=0.5))
    for _ in range(2):  # a second fit finds the same
        surgery.fit(model, given)
        for each, (positive, negative) in zip(report.inserted, means, strict=True):
            vector = model.get_submodule(each.path).vector
            torch.testing.assert_close(vector, positive - negative)
            assert vector.norm() > 0.01
    merges(model)


def test_adalora_prunes_to_its_budget() -> None:
    model = make_model("grouped")
    report = surgery.splice(model, "adalora")
    surgery.freeze_base(model)
    modules: list[Any] = [model.get_submodule(each.path) for each in report.inserted]
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(surgery.parameter_groups(model, lr=1e-2))
    life, counts, extras = surgery.life_cycle(model, total_steps=20), [], []
    for _ in range(20):
        extra = life.extra_loss()
        (model(input_ids=IDS, labels=IDS).loss + extra).backward()
        optimizer.step()
        life.step()
        optimizer.zero_grad()
        counts.append(sum(int((m.l != 0).sum()) for m in modules))
        extras.append(extra.item())
    eye = torch.eye(6)
    pairs = [w.T @ w - eye for m in modules for w in (m.q, m.p)]
    assert life.extra_loss().item() == pytest.approx(0.1 * sum(p.norm().item() ** 2 for p in pairs))
    assert counts[0] == 24
    assert counts[-6:] == [8] * 6
    assert counts == sorted(counts, reverse=True)
    assert extras[-1] < extras[0]
    merges(model)


def test_talking_heads_mix_scores_and_weights() -> None:
    model = make_model("eager")
    site = surgery.locate(model).attention[0]
    scores, values = seen(model, site, "scores", "value_heads")
    before, behind = (m.mix for m in spliced("talking_heads", model)[:2])
    (merged,) = seen(model, site, "merged")
    causal = torch.ones(7, 7).tril().bool()
    with torch.no_grad():
        mixed = torch.stack(
            [sum(before[h, i] * scores[:, h] for h in range(4)) for i in range(4)], 1
        )
        weights = mixed.masked_fill(~causal, -torch.inf).softmax(-1)
        weights = torch.stack(
            [sum(behind[h, i] * weights[:, h] for h in range(4)) for i in range(4)], 1
        )
        expected = (weights @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-4)
