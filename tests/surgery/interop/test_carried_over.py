"""Splices that are older than the tensor-parallel plan that divides their model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import surgery
from surgery.interop import is_carried_over
from surgery.splicer import late_division
from tests.support.models import perturb
from tests.support.sharding import (
    IDS,
    distributed,
    divided,
    first_alone_writes,
    fresh,
    in_two_processes,
    lora,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def _own(model: Any) -> dict[str, Any]:
    return dict(surgery.spliced_parameters(model))


def test_a_plan_after_the_splice_keeps_parameters_and_outputs(
    mesh: DeviceMesh, tmp_path: Path
) -> None:
    model = fresh()
    base = model(IDS).logits
    surgery.splice(model, lora(bias=True))
    perturb(model)
    before, expected = _own(model), model(IDS).logits
    divided(model, mesh)
    torch.testing.assert_close(model(IDS).logits, expected)
    after = _own(model)
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all(map(is_carried_over, after.values()))
    with surgery.disabled(model):
        torch.testing.assert_close(model(IDS).logits, base)
    surgery.save(model, tmp_path)
    assert torch.equal(surgery.load(fresh(), tmp_path)(IDS).logits, expected)
    surgery.remove(model)
    torch.testing.assert_close(model(IDS).logits, base)
    torch.testing.assert_close(surgery.load(model, tmp_path)(IDS).logits, expected)


@pytest.mark.parametrize("mode", ["inference", "autocast", "checkpointing", "generation"])
def test_the_first_call_may_be_of_any_kind(mode: str, mesh: DeviceMesh) -> None:
    """What the first call does must not show in the trial that it begins with."""
    model, alone = fresh(), fresh()
    for each in (model, alone):
        torch.manual_seed(2)
        surgery.splice(each, lora())
        surgery.freeze_base(each)
        perturb(each)
    divided(model, mesh)
    found = []
    for each in (model, alone):
        if mode == "inference":
            with torch.inference_mode():
                found.append(each(IDS).logits.clone())
        elif mode == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                found.append(each(IDS).logits)
        elif mode == "generation":
            found.append(each.generate(IDS, max_new_tokens=4, do_sample=False))
        else:
            each.gradient_checkpointing_enable()
            each.train()(IDS, labels=IDS).loss.backward()
            found.append(torch.cat([p.grad.flatten() for p in _own(each).values()]))
    torch.testing.assert_close(*found)
    assert all(map(is_carried_over, _own(model).values()))
    model.eval()(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in _own(model).values())


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (surgery.method("inducer"), "'inducer'.*no divided_axes"),
        (surgery.method("prefix", length=2), "'prefix'.*no divided_axes"),
        (surgery.method("prompt", length=2), "'prompt'.*no divided_axes"),
        (surgery.method("ia3"), "'ia3'.*no divided_axes"),
        (surgery.method("ffn_adapter"), "'ffn_adapter'.*no divided_axes"),
        (lora(dropout=0.1), "'lora'.*dropout draws masks"),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_other_methods_are_refused_by_name_and_nothing_has_changed(
    method: surgery.Method, reason: str, mesh: DeviceMesh
) -> None:
    model = fresh()
    base = model(IDS).logits
    surgery.splice(model, lora(ports=("query",)), name="first")
    surgery.splice(model, method)
    perturb(model)
    before = {name: (p, p.detach().clone()) for name, p in _own(model).items()}
    divided(model, mesh)
    for _ in range(2):
        with pytest.raises(surgery.ForwardError, match=f"plan has divided.*{reason}"):
            model(IDS)
    for name, parameter in _own(model).items():
        assert parameter is before[name][0]
        assert type(parameter) is torch.nn.Parameter
        assert torch.equal(parameter, before[name][1])
    surgery.remove(model, "default")
    model(IDS)
    surgery.remove(model)
    torch.testing.assert_close(model(IDS).logits, base)


def test_a_prompt_alone_is_refused_and_removed(mesh: DeviceMesh) -> None:
    """It runs no rewritten graph; each process would go on with what it drew for itself."""
    model = fresh()
    base = model(IDS).logits
    surgery.splice(model, surgery.method("prompt", length=2))
    model(IDS)
    divided(model, mesh)
    with pytest.raises(surgery.ForwardError, match=r"'prompt'.*no divided_axes"):
        model(IDS)
    surgery.remove(model)
    torch.testing.assert_close(model(IDS).logits, base)


def test_a_head_that_a_plan_divides_later_is_refused(mesh: DeviceMesh) -> None:
    model = fresh()
    surgery.splice(model, lora(ports=("output",)), at=surgery.locate(model).linear)
    divided(model, mesh)
    with pytest.raises(surgery.ForwardError, match="a forward is set on this module itself"):
        model(IDS)


def test_a_copy_is_refused(mesh: DeviceMesh) -> None:
    model = fresh()
    surgery.splice(model, lora())
    again = divided(copy.deepcopy(model), mesh)
    with pytest.raises(surgery.ForwardError, match="this copy of the model is whole"):
        again(IDS)


def test_a_host_that_differs_leaves_every_parameter_whole(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh()
    surgery.splice(model, lora())
    perturb(model)
    divided(model, mesh)
    verify, paths = late_division.verify_division, list[str]()

    def fail_at_the_second(model: Any, report: Any, todo: Any, mesh: Any) -> None:
        paths.extend(todo)
        verify(model, report, todo, mesh)
        if len(paths) == 2:
            raise surgery.SpliceError("differs")

    monkeypatch.setattr(late_division, "verify_division", fail_at_the_second)
    with pytest.raises(surgery.ForwardError, match="differs Nothing is divided now"):
        model(IDS)
    assert all(type(p) is torch.nn.Parameter for p in _own(model).values())
    model(IDS)
    assert all(map(is_carried_over, _own(model).values()))


def _close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def _learns(rank: int, folder: str) -> None:
    """Splice and make optimizers, apply the plan, train, save and load, beside one process."""
    model, alone = fresh(), fresh()
    base = alone(IDS).logits
    torch.manual_seed(1 + rank)  # what each process draws for itself: the first one's counts
    surgery.splice(model, lora(bias=True))
    torch.manual_seed(1)
    surgery.splice(alone, lora(bias=True))
    optimisers = []
    for each in (model, alone):
        surgery.freeze_base(each)
        chosen = [p for p in each.parameters() if p.requires_grad]
        optimisers.append(torch.optim.AdamW(chosen, lr=0.05))
    distributed(model)
    _close(model(IDS).logits, base)
    for _ in range(3):
        for each, optimiser in zip((model, alone), optimisers, strict=True):
            optimiser.zero_grad()
            each(IDS, labels=IDS).loss.backward()
        for name, parameter in _own(alone).items():
            _close(_own(model)[name].grad, parameter.grad)
        for each, optimiser in zip((model, alone), optimisers, strict=True):
            torch.nn.utils.clip_grad_norm_(list(_own(each).values()), max_norm=0.1)
            optimiser.step()
    expected = alone(IDS).logits
    assert not torch.allclose(expected, base, atol=1e-2)
    _close(model(IDS).logits, expected)
    given = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(IDS, **given), alone.generate(IDS, **given))
    first_alone_writes(rank)
    surgery.save(model, f"{folder}/adapter")
    surgery.save(model, f"{folder}/peft", format="peft")
    model.save_pretrained(f"{folder}/checkpoint")
    dist.barrier()
    for adapter in ("adapter", "peft", "checkpoint"):
        _close(surgery.load(fresh(), f"{folder}/{adapter}")(IDS).logits, expected)
    early = distributed(surgery.load(fresh(), f"{folder}/adapter"))
    surgery.save(early, f"{folder}/early")  # before its first call
    _close(surgery.load(fresh(), f"{folder}/early")(IDS).logits, expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(early(IDS).logits.float(), expected, rtol=0.05, atol=0.05)
    _close(early(IDS).logits, expected)
    _close(surgery.load(distributed(fresh()), f"{folder}/adapter")(IDS).logits, expected)
    with pytest.raises(surgery.SpliceError, match="sharded"):
        surgery.merge(model)
    surgery.splice(model, surgery.method("lora", rank=3), name="second")
    _close(model(IDS).logits, expected)
    with surgery.disabled(model):
        _close(model(IDS).logits, base)
    surgery.remove(model)
    _close(model(IDS).logits, base)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    in_two_processes(tmp_path, _learns)


def _is_spliced_again(rank: int, folder: str) -> None:
    """Splice before the plan and after it, with no call between; load an adapter; train both."""
    model, alone = fresh(), fresh()
    for each in (model, alone):
        torch.manual_seed(1)
        surgery.splice(each, lora())
        perturb(each)
    surgery.save(alone, f"{folder}/{rank}", plain=False)
    distributed(model)
    for each in (model, alone):
        torch.manual_seed(4)
        surgery.splice(each, lora(bias=True), name="second")
        each(IDS, labels=IDS).loss.backward()
    for name, parameter in _own(alone).items():
        gradient = _own(model)[name].grad
        _close(getattr(gradient, "full_tensor", lambda g=gradient: g)(), parameter.grad)
    surgery.hotswap(model, "default", f"{folder}/0")
    _close(model(IDS).logits, alone(IDS).logits)


@pytest.mark.slow
def test_splices_before_and_after_a_plan_go_together(tmp_path: Path) -> None:
    in_two_processes(tmp_path, _is_spliced_again)
