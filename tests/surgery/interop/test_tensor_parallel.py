"""LoRA in models that a tensor-parallel plan of transformers has divided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import surgery
from tests.support.sharding import IDS, divided, fresh, in_two_processes, lora

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_plan_of_one_process_changes_nothing(mesh: DeviceMesh, tmp_path: Path) -> None:
    model = divided(fresh(), mesh)
    base = model(IDS).logits
    sites = surgery.locate(model)
    assert str(sites) == str(surgery.locate(fresh()))
    report = surgery.splice(model, lora(bias=True), at=sites)
    assert str(report) == str(surgery.splice(fresh(), lora(bias=True)))
    assert torch.equal(model(IDS).logits, base)
    assert all(hasattr(p, "full_tensor") for p in model.get_submodule(report.inserted[0].path)
               .parameters())  # fmt: skip
    surgery.save(model, tmp_path)
    torch.testing.assert_close(surgery.load(fresh(), tmp_path)(IDS).logits, base)
    surgery.remove(model)
    assert torch.equal(model(IDS).logits, base)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (surgery.method("inducer"), "no divided_axes"),
        (surgery.method("prompt"), "no divided_axes"),
        (surgery.method("ia3"), "no divided_axes"),
        (lora(dropout=0.1), "dropout draws masks"),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_other_methods_are_refused_and_nothing_has_changed(
    method: surgery.Method, reason: str, mesh: DeviceMesh
) -> None:
    model = divided(fresh(), mesh)
    base = model(IDS).logits
    before = {name: vars(m).get("forward") for name, m in model.named_modules()}
    with pytest.raises(surgery.SpliceError, match=f"tensor parallelism has split.*{reason}"):
        surgery.splice(model, method)
    assert before == {name: vars(m).get("forward") for name, m in model.named_modules()}
    assert all(hasattr(m.weight, "full_tensor") for m in model.modules()
               if isinstance(m, torch.nn.Linear))  # fmt: skip
    assert torch.equal(model(IDS).logits, base)


def test_a_head_that_a_plan_has_divided_is_refused(mesh: DeviceMesh) -> None:
    model = divided(fresh(), mesh)
    with pytest.raises(surgery.SpliceError, match="a forward is set on this module itself"):
        surgery.splice(model, lora(ports=("output",)), at=surgery.locate(model).linear)


def test_what_needs_whole_weights_is_refused(mesh: DeviceMesh) -> None:
    model = divided(fresh(), mesh)
    surgery.splice(model, lora())
    surgery.copy(model, "default", "other")
    for operate, reason in (
        (lambda: surgery.merge(model), "sharded"),
        (lambda: surgery.combine(model, ["default", "other"], "sum"), "needs them whole"),
        (lambda: surgery.train_rows(model, "lm_head.weight", [3]), "sharded over"),
    ):
        with pytest.raises(surgery.SpliceError, match=reason):
            operate()
    surgery.combine(model, ["default", "other"], "average", how="average")


def _loaded(folder: str, plan: str | None = "auto") -> Any:
    return type(fresh()).from_pretrained(f"{folder}/base", tp_plan=plan).eval()


def _close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def _learns(rank: int, folder: str) -> None:
    """Splice, train with clipped gradients, save and load, each beside a model of one process."""
    model = _loaded(folder)
    base = model(IDS).logits
    torch.manual_seed(rank)  # what each process draws for itself
    surgery.splice(model, lora(bias=True))
    assert torch.equal(model(IDS).logits, base)
    surgery.save(model, f"{folder}/start")
    alone = surgery.load(_loaded(folder, None), f"{folder}/start")
    optimisers = []
    for each in (model, alone):
        surgery.freeze_base(each)
        chosen = [p for p in each.parameters() if p.requires_grad]
        optimisers.append(torch.optim.AdamW(chosen, lr=0.05))
    for _ in range(3):
        for each, optimiser in zip((model, alone), optimisers, strict=True):
            optimiser.zero_grad()
            each(IDS, labels=IDS).loss.backward()
        own = dict(surgery.spliced_parameters(model))
        for name, parameter in surgery.spliced_parameters(alone):
            _close(own[name].grad.full_tensor(), parameter.grad)  # type: ignore[union-attr]
        for each, optimiser in zip((model, alone), optimisers, strict=True):
            torch.nn.utils.clip_grad_norm_(
                [p for p in each.parameters() if p.requires_grad], max_norm=0.1
            )
            optimiser.step()
    expected = alone(IDS).logits
    assert not torch.allclose(expected, base, atol=1e-2)
    _close(model(IDS).logits, expected)
    given = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(IDS, **given), alone.generate(IDS, **given))
    surgery.save(model, f"{folder}/divided")
    if rank == 0:
        surgery.save(alone, f"{folder}/alone")
    dist.barrier()
    for adapter in ("divided", "alone"):
        for plan in ("auto", None):
            _close(surgery.load(_loaded(folder, plan), f"{folder}/{adapter}")(IDS).logits, expected)
    _is_served(model, alone, folder)
    surgery.remove(model)
    assert torch.equal(model(IDS).logits, base)


def _is_served(model: Any, alone: Any, folder: str) -> None:
    """Switch, route, swap and splice again as in a model of one process."""
    expected = alone(IDS).logits
    torch.manual_seed(0)
    surgery.splice(model, surgery.method("lora", rank=3), name="second")
    surgery.copy(model, "default", "copied")
    rows = ["default", "copied", "second", None]
    with surgery.route(rows):
        _close(model(IDS).logits[:2], expected[:2])
    surgery.hotswap(model, "copied", f"{folder}/start")
    surgery.use(model, "default")
    _close(model(IDS).logits, expected)


@pytest.mark.slow
def test_two_processes_of_a_plan_learn_what_one_does(tmp_path: Path) -> None:
    in_two_processes(tmp_path, _learns)


def _is_read_by_one(rank: int, folder: str) -> None:
    """Save what was spliced after the plan as a trainer does."""
    model = _loaded(folder)
    surgery.splice(model, lora(), at=surgery.locate(model).attention)
    surgery.freeze_base(model)
    perturb_alike(model)
    model.gradient_checkpointing_enable()
    model.train()(IDS, labels=IDS).loss.backward()
    model.save_pretrained(f"{folder}/checkpoint")
    dist.barrier()
    again = surgery.load(_loaded(folder, None), f"{folder}/checkpoint")
    _close(again(IDS).logits, model.eval()(IDS).logits)


def perturb_alike(model: Any) -> None:
    """Move inserted parameters off their start, those of all processes alike."""
    from torch.distributed.tensor import distribute_tensor

    torch.manual_seed(3)
    with torch.no_grad():
        for _, parameter in surgery.spliced_parameters(model):
            mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
            noise = torch.randn(parameter.shape) * 0.1
            parameter.add_(distribute_tensor(noise, mesh, placements))


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_is_read_by_one(tmp_path: Path) -> None:
    in_two_processes(tmp_path, _is_read_by_one)
