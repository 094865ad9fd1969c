"""Replacements are seen by one thread, and nothing stays replaced."""

from __future__ import annotations

import os
import random
import signal
import threading
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery.interop import exclusively, patched
from surgery.interop.patching import OwnValue
from tests.support.interrupts import process
from tests.support.models import PlainBlock

X = torch.randn(2, 3, 8)


def answer(original: Any) -> Any:
    return lambda *given: "replaced"


def elsewhere(act: Any) -> Any:
    """What ``act`` returns in another thread."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(act()))
    thread.start()
    thread.join()
    return found[0]


def test_one_thread_sees_a_replacement() -> None:
    one = torch.ones(())
    with patched((torch, "neg", answer)):
        assert torch.neg(one) == "replaced"
        assert elsewhere(lambda: torch.neg(one)) == -1
    assert torch.neg(one) == -1


def test_one_thread_sees_another_value() -> None:
    layer, other = nn.Dropout(), nn.Dropout()
    with patched((nn.Module, "training", OwnValue([layer], False))):
        assert not layer.training
        assert other.training
        assert elsewhere(lambda: layer.training)
        layer.eval()
        assert not elsewhere(lambda: layer.training)
    assert not layer.training
    assert "training" not in vars(nn.Module)


def test_what_a_context_manager_leaves_is_put_back_at_the_end_of_the_operation() -> None:
    before, kept = torch.neg, []

    def operate() -> None:
        kept.append(patched((torch, "neg", answer)))
        kept[0].__enter__()
        assert torch.neg(torch.ones(())) == "replaced"
        raise KeyboardInterrupt  # and the context manager never ends

    with pytest.raises(KeyboardInterrupt):
        exclusively(operate)
    assert torch.neg is before
    with patched((torch, "abs", answer)):
        kept.clear()  # it ends now, and ends nothing else
        assert torch.abs(torch.ones(())) == "replaced"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked on POSIX alone")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_during_a_splice_inherits_no_replacement() -> None:
    clean, results = process(), []
    stop = threading.Event()

    def fork() -> None:
        while not stop.is_set():
            child = os.fork()
            if child == 0:
                signal.alarm(20)  # a child that hangs ends as a failure
                # A child that has threads of autograd behind it can run no forward with gradients.
                with torch.no_grad(), patched((torch, "abs", answer)):
                    good = "chosen" not in torch.neg.__name__ and torch.abs(X) == "replaced"
                os._exit(0 if good else 1)
            results.append(os.waitpid(child, 0)[1])

    thread = threading.Thread(target=fork)
    thread.start()
    try:
        for _ in range(4):
            model = PlainBlock(8, 2, prenorm=True, fused=True)
            surgery.splice(model, surgery.method("lora"), example_inputs=X)
    finally:
        stop.set()
        thread.join()
    assert results
    assert not any(results)
    assert process() == clean


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="timers are of POSIX alone")
def test_a_splice_that_signals_interrupt_leaves_torch_as_it_was() -> None:
    clean, came = process(), 0
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    chance = random.Random(0)
    try:
        for _ in range(40):
            model = PlainBlock(8, 2, prenorm=True, fused=True)
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-4, 0.1))
                surgery.splice(model, surgery.method("lora"), example_inputs=X)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                came += 1
            assert process() == clean
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert came


def test_a_forward_may_call_an_operator_by_its_name_in_torch_ops() -> None:
    """``torch.ops`` answers to any name, such as one by which a replacement could be known."""

    class Called(PlainBlock):
        def forward(self, x: Any) -> Any:
            return torch.ops.aten.neg(super().forward(torch.ops.aten.neg(x)))

    torch.manual_seed(0)
    model = Called(8, 2, prenorm=True, fused=True).eval()
    before = model(X)
    surgery.splice(model, surgery.method("lora", rank=2), at=surgery.locate(model, X))
    assert torch.equal(model(X), before)
