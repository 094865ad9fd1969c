"""What methods do while a model trains: the same hooks in a loop, in Trainer, after a resume."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import surgery
from surgery.plugin.registry import registry
from surgery.testing import make_model

IDS = torch.arange(14).reshape(2, 7) * 5 % 40 + 3
BATCHES = [{"input_ids": IDS}, {"input_ids": IDS.flip(1)}]


class Pruned(nn.Module):
    """A B with a mask of its ranks, a count of steps, and a rate of its own for B."""

    def __init__(self, width: int, out: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, width) / width**0.5)
        self.b = nn.Parameter(torch.zeros(rank, out))
        self.register_buffer("mask", torch.ones(rank))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def learning_rates(self) -> dict[str, float]:
        return {"b": 4.0}

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.a.T * self.mask) @ self.b


@dataclass(frozen=True)
class Pruning(surgery.Method):
    """Drops the rank with the least gradient at every step, until one is left."""

    name = "pruning"
    rank: int = 4
    weight: float = 0.0
    spoils: bool = False

    def splice(self, site: surgery.OpenSite) -> None:
        port = site.port("query")
        port.add(Pruned(port.in_width, port.width, self.rank), name="pruned", reads=("input",))

    def on_train_start(self, model: nn.Module, total_steps: int) -> None:
        for module in self.inserted:
            module.total = total_steps

    def on_step(self, step: int) -> None:
        for module in self.inserted:
            assert module.b.grad is not None
            module.steps.fill_(step)
            kept = max(1, self.rank - step)
            module.mask[kept:] = 0.0

    def extra_loss(self) -> Tensor | None:
        if not self.weight:
            return None
        return self.weight * sum(module.a.square().sum() for module in self.inserted)

    def fit(self, model: nn.Module, batches: Iterable[Any]) -> None:
        seen: list[Tensor] = []
        module = self.inserted[0]
        hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
        for batch in batches:
            model(**batch)
        hook.remove()
        axes = torch.linalg.svd(torch.cat(seen))[2]
        module.a.copy_(axes[: self.rank])
        if self.spoils:
            module.b.fill_(1.0)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry()._offered["method"], Pruning.name, (Pruning, "tests"))


def spliced(**options: Any) -> Any:
    model: Any = make_model("fused")
    torch.manual_seed(0)
    surgery.splice(model, Pruning(**options))
    surgery.freeze_base(model)
    return model.eval()


def modules(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, Pruned)]


def loop(model: Any, steps: int, total: int, done: int = 0) -> None:
    groups = surgery.parameter_groups(model, lr=1e-2)
    optimizer = torch.optim.SGD(groups)
    life = surgery.life_cycle(model, total, steps=done)
    for _ in range(steps):
        out = model(**BATCHES[0])
        logits = getattr(out, "logits", out)
        (logits.square().mean() + life.extra_loss()).backward()
        optimizer.step()
        life.step()
        optimizer.zero_grad()


def test_a_loop_calls_the_hooks_of_the_splices_that_train() -> None:
    model = spliced()
    loop(model, 2, total=5)
    for module in modules(model):
        assert module.total == 5
        assert int(module.steps) == 2
        assert module.mask.tolist() == [1.0, 1.0, 0.0, 0.0]
    surgery.splice(model, Pruning(), name="other")
    surgery.freeze_base(model, train="other")
    loop(model, 1, total=5)
    assert sorted(int(m.steps) for m in modules(model)) == [1] * 2 + [2] * 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_hooks_act_on_a_copy_and_not_on_its_original(copied: Any) -> None:
    model = spliced()
    twin = copied(model)
    loop(twin, 3, total=3)
    assert [int(m.steps) for m in modules(twin)] == [3, 3]
    assert [int(m.steps) for m in modules(model)] == [0, 0]


def test_rates_of_single_parameters_are_in_the_groups() -> None:
    model = spliced()
    rates = {g["lr"]: len(g["params"]) for g in surgery.parameter_groups(model, lr=0.5)}
    assert rates == {0.5: 2, 2.0: 2}
    faster = surgery.parameter_groups(model, lr=0.5, b_ratio=2)
    assert {g["lr"] for g in faster} == {0.5, 2.0}  # b_ratio is for what fast_parameters names


def test_an_extra_loss_has_its_gradient() -> None:
    model = spliced(weight=0.5)
    surgery.life_cycle(model, 3).extra_loss().backward()
    for module in modules(model):
        torch.testing.assert_close(module.a.grad, module.a.detach())


def trainer(model: Any, folder: Path, steps: int = 2, **given: Any) -> Trainer:
    data = [{"input_ids": row, "labels": row} for row in IDS]
    told = TrainingArguments(
        str(folder), max_steps=steps, report_to=[], use_cpu=True, disable_tqdm=True,
        learning_rate=1e-2, per_device_train_batch_size=2, lr_scheduler_type="constant", **given,
    )  # fmt: skip
    groups = surgery.parameter_groups(model, lr=1e-2)
    return Trainer(model, told, train_dataset=data, optimizers=(torch.optim.SGD(groups), None))


def test_trainer_calls_them_and_adds_the_gradient_of_an_extra_loss(tmp_path: Path) -> None:
    plain, model = spliced(), spliced(weight=0.5)
    starts = [module.a.detach().clone() for module in modules(model)]
    for each in (plain, model):
        trainer(each, tmp_path, steps=1, save_strategy="no").train()
    for a, b, start in zip(modules(plain), modules(model), starts, strict=True):
        assert (int(a.steps), a.total, int(b.steps), b.total) == (1, 1, 1, 1)
        torch.testing.assert_close(b.a, a.a - 1e-2 * start)
        assert torch.equal(a.b, b.b)


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_save = control.should_training_stop = state.global_step == 1

    whole = spliced()
    trainer(whole, tmp_path / "whole", steps=3, save_strategy="no").train()
    first = spliced()
    stopped = trainer(first, tmp_path / "part", steps=3)
    stopped.add_callback(Stop)
    stopped.train()
    second = spliced()
    resumed = trainer(second, tmp_path / "part", steps=3)
    resumed.train(resume_from_checkpoint=True)
    for a, b in zip(modules(whole), modules(second), strict=True):
        assert int(b.steps) == 3
        assert torch.equal(a.mask, b.mask)
        assert torch.equal(a.b, b.b)


def test_a_trainer_whose_optimizer_has_one_rate_is_refused(tmp_path: Path) -> None:
    model = spliced()
    made = trainer(model, tmp_path)
    made.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with pytest.raises(surgery.MethodError, match=r"learns at 4\.0 times the rate"):
        made.train()
    assert [int(m.steps) for m in modules(model)] == [0, 0]


def test_fit_initialises_from_data_and_leaves_the_outputs() -> None:
    model = spliced()
    before = model(**BATCHES[0]).logits
    surgery.fit(model, BATCHES)
    a = modules(model)[0].a.detach()
    torch.testing.assert_close(a @ a.T, torch.eye(4), rtol=0, atol=1e-5)
    assert torch.equal(model(**BATCHES[0]).logits, before)


def test_a_fit_that_spoils_an_exact_start_is_undone() -> None:
    model = spliced(spoils=True)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(surgery.MethodError, match="the start is exact, and fit has changed"):
        surgery.fit(model, BATCHES)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_what_cannot_be_done_is_refused() -> None:
    model = spliced()
    with pytest.raises(surgery.SpliceError, match="an iterator"):
        surgery.fit(model, iter(BATCHES))
    with pytest.raises(surgery.SpliceError, match="empty"):
        surgery.fit(model, [])
    for total, done in ((0, 0), (3, 4), (2.5, 0), (True, 0)):
        with pytest.raises(surgery.SpliceError, match="must be whole numbers"):
            surgery.life_cycle(model, total, steps=done)  # type: ignore[arg-type]
    with pytest.raises(surgery.MethodError, match="inserted is there in fit"):
        _ = Pruning().inserted
    plain: Any = make_model("fused")
    surgery.splice(plain, surgery.method("lora", rank=2))
    with pytest.raises(surgery.MethodError, match="that trains initialises itself"):
        surgery.fit(plain, BATCHES)
    surgery.life_cycle(plain, 2).step()  # has nothing to call


def test_the_hook_in_contributing_runs() -> None:
    text = (Path(__file__).parents[3] / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```python\n(def on_step.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    calls: list[Any] = []
    module = SimpleNamespace(b=SimpleNamespace(grad=3), prune=lambda *given: calls.append(given))
    names["on_step"](SimpleNamespace(inserted=(module,)), 5)
    assert calls == [(5, 3)]
