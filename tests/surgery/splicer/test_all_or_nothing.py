"""An exception at any line of an operation leaves a model as before or as after."""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery.interop import deliver, exclusively
from tests.support.interrupts import description, interrupted, places, process
from tests.support.models import PlainBlock, perturb

LORA, ADAPTER = surgery.method("lora", rank=2), surgery.method("ffn_adapter", rank=2)
# A file whose ``with`` block is interrupted at its end is closed when it is collected.
unclosed = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = PlainBlock(8, 2, prenorm=True, fused=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(x))


def base() -> nn.Module:
    torch.manual_seed(0)
    return Model().eval()


def adapted() -> nn.Module:
    """A model with two splices, a trained head and trained rows."""
    model = base()
    surgery.splice(model, LORA, example_inputs=X)
    surgery.splice(model, ADAPTER, example_inputs=X, name="second")
    surgery.freeze_base(model, keep=["head.bias"])
    surgery.train_rows(model, "head.weight", [1])
    perturb(model)
    return model


def saved(folder: Path) -> Path:
    model = adapted()
    with torch.no_grad():
        model.head.bias += 1.0  # type: ignore[operator, union-attr]
        model.head.weight[1] += 1.0  # type: ignore[index, union-attr]
    surgery.save(model, folder)
    return folder


def undo(model: nn.Module) -> None:
    model.merged.undo(model)


def merged() -> nn.Module:
    model = adapted()
    object.__setattr__(model, "merged", surgery.merge(model, "default"))
    return model


def act_disabled(model: nn.Module) -> None:
    with surgery.disabled(model):
        model(X)


def act_routed(model: nn.Module) -> None:
    with surgery.route(["default", "second"], model):
        model(X)


OPERATIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Path], Any]]] = {
    "splice": (base, lambda m, _: surgery.splice(m, LORA, example_inputs=X)),
    "splice again": (
        adapted,
        lambda m, _: surgery.splice(m, LORA, example_inputs=X, name="third"),
    ),
    "remove": (adapted, lambda m, _: surgery.remove(m)),
    "remove one": (adapted, lambda m, _: surgery.remove(m, "second")),
    "merge": (adapted, lambda m, _: surgery.merge(m, partial=True)),
    "undo": (merged, lambda m, _: undo(m)),
    "load": (base, lambda m, folder: surgery.load(m, folder, X)),
    "restore": (adapted, lambda m, folder: surgery.restore(m, folder)),
    "disabled": (adapted, lambda m, _: act_disabled(m)),
    "use": (adapted, lambda m, _: surgery.use(m, "second")),
    "routed": (adapted, lambda m, _: act_routed(m)),
    "a forward": (adapted, lambda m, _: m(X)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("adapters") / "adapter")


def trials(name: str, folder: Path, count: int) -> None:
    """Interrupt an operation at this many lines; the model must be that of before or of after."""
    make, operate = OPERATIONS[name]
    model = make()
    before, outputs_before = description(model), model(X).detach()
    done = make()
    operate(done, folder)
    after, outputs_after = description(done), done(X).detach()
    clean = process()
    for at in places(count, operate, make(), folder):
        model = make()
        hit = interrupted(at, operate, model, folder)
        assert process() == clean, f"at {at}"
        assert others_may_operate(), f"at {at}"
        now = description(model)
        assert now in (before, after), f"at {at}: {differing(now, before, after)}"
        expected = outputs_before if now == before else outputs_after
        torch.testing.assert_close(model(X), expected, rtol=1e-6, atol=1e-6)
        assert hit or now == after


def others_may_operate() -> bool:
    """Whether another thread gets its turn: an interrupted operation keeps no lock."""
    thread = threading.Thread(target=exclusively, args=(lambda: None,), daemon=True)
    thread.start()
    thread.join(timeout=20)
    return not thread.is_alive()


def differing(now: Any, before: Any, after: Any) -> str:
    return str([(key, now[key], before[key], after[key]) for key in now if now[key] != before[key]])


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.few(8)
@unclosed
def test_an_exception_at_any_line_leaves_all_or_nothing(name: str, folder: Path) -> None:
    trials(name, folder, 4)


@pytest.mark.slow
@unclosed
@pytest.mark.parametrize("name", OPERATIONS)
def test_400_exceptions_leave_all_or_nothing(name: str, folder: Path) -> None:
    trials(name, folder, 400)


def test_signals_wait_until_they_do_no_harm() -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: came.append(number))
    try:

        def operate() -> None:
            signal.raise_signal(signal.SIGUSR1)
            exclusively(lambda: signal.raise_signal(signal.SIGUSR1))
            assert not came
            deliver()
            assert came == [signal.SIGUSR1] * 2
            signal.raise_signal(signal.SIGUSR1)

        exclusively(operate)
        assert came == [signal.SIGUSR1] * 3
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_operations_of_threads_wait_for_each_other() -> None:
    model, names = base(), [f"splice_{i}" for i in range(4)]
    threads = [
        threading.Thread(
            target=surgery.splice, args=(model, LORA), kwargs={"example_inputs": X, "name": name}
        )
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(description(model)["splices"]) == names
    for name in itertools.chain(names[2:], names[:2]):
        surgery.remove(model, name)
    assert description(model) == description(base())
