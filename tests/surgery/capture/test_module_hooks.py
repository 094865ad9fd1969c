"""Hooks of modules that a graph passes through fire as in the base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery.capture.module_hooks import _entered
from tests.support.forwards import Attention, pair, tokens
from tests.support.models import NAMES, build, inputs, logits
from tests.support.splices import with_inducer_and_lora


class Wrapped(nn.Module):
    """The projections and the output in modules of their own, as encoders have it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()
        self.inner.outward = nn.Identity()  # type: ignore[assignment]
        self.outward = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outward(self.inner(x))
        return out


@pytest.mark.parametrize(
    "register", ["register_full_backward_hook", "register_full_backward_pre_hook"]
)
def test_backward_hooks_inside_a_host_fire(register: str) -> None:
    base, model = pair(Wrapped)
    seen: list[list[Tensor]] = []
    for each in (base, model):
        found: list[Tensor] = []
        getattr(each.inner, register)(lambda module, *grads, f=found: f.append(grads[0][0]))
        each(tokens().requires_grad_()).sum().backward()
        seen.append(found)
    assert len(seen[0]) == len(seen[1]) == 1
    torch.testing.assert_close(seen[1][0], seen[0][0])


@pytest.mark.parametrize("name", NAMES)
def test_forward_hooks_on_any_module_fire_once_with_the_same_tensors(name: str) -> None:
    expected, seen = watch_all(build(name), name), watch_all(with_inducer_and_lora(name), name)
    for path, outputs in expected.items():
        assert len(seen[path]) == len(outputs), path
        assert all(map(torch.equal, seen[path], outputs)), path


def watch_all(model: Any, name: str) -> dict[str, list[torch.Tensor]]:
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor):
                seen.setdefault(path, []).append(first)

        return hook

    for path, module in model.named_modules():
        module.register_forward_hook(watch(path), with_kwargs=True)
    logits(model, inputs(name))
    return seen


def test_a_hook_that_changes_an_output_still_does() -> None:
    model, case = with_inducer_and_lora("roberta"), inputs("roberta")
    before = logits(model, case)
    inner = model.roberta.encoder.layer[0].attention.self
    handle = inner.register_forward_hook(lambda m, a, o: (o[0] * 2, *o[1:]))
    assert not torch.equal(logits(model, case), before)
    handle.remove()
    assert torch.equal(logits(model, case), before)


GLOBAL = {
    "forward pre": nn.modules.module.register_module_forward_pre_hook,
    "forward": nn.modules.module.register_module_forward_hook,
    "full backward": nn.modules.module.register_module_full_backward_hook,
    "full backward pre": nn.modules.module.register_module_full_backward_pre_hook,
}


def events(model: Any, case: Any, kind: str, base: set[str]) -> list[tuple[str, Any]]:
    """The modules of the base for which a global hook of this kind fires, with a first tensor."""
    seen: list[tuple[str, Any]] = []
    paths = {id(module): path for path, module in model.named_modules()}

    def hook(module: nn.Module, *given: Any) -> None:
        if (path := paths.get(id(module))) in base:
            first = next((x for x in (given[-1] if given else ()) if isinstance(x, Tensor)), None)
            seen.append((path, None if first is None else first.detach().clone()))

    handle = GLOBAL[kind](hook)
    try:
        logits(model, case)
        if "backward" in kind:
            logits(model, case).square().sum().backward()
    finally:
        handle.remove()
    return seen


@pytest.mark.filterwarnings("ignore:For backward hooks", "ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", GLOBAL)
@pytest.mark.parametrize("name", ["roberta", "llama"])
def test_global_hooks_fire_as_in_the_base(name: str, kind: str) -> None:
    base, model, case = build(name), with_inducer_and_lora(name), inputs(name)
    names = {path for path, _ in base.named_modules()}
    grad = torch.enable_grad() if "backward" in kind else torch.no_grad()
    with grad:
        expected, seen = events(base, case, kind, names), events(model, case, kind, names)
    # The backward pass may visit branches in another order: the updates are branches too.
    order = sorted if "backward" in kind else list
    assert order(path for path, _ in seen) == order(path for path, _ in expected)
    assert any(path.endswith(("self", "attn", "attention")) for path, _ in seen)


def test_a_global_hook_can_change_an_output() -> None:
    base, model, case = build("roberta"), with_inducer_and_lora("roberta"), inputs("roberta")
    inner = type(base.roberta.encoder.layer[0].attention.self)

    def halve(module: nn.Module, args: Any, output: Any) -> Any:
        return (output[0] * 0.5, *output[1:]) if isinstance(module, inner) else None

    handle = nn.modules.module.register_module_forward_hook(halve)
    try:
        changed, expected = logits(model, case), logits(base, case)
    finally:
        handle.remove()
    assert torch.equal(changed, expected)
    assert not torch.equal(expected, logits(base, case))


def test_keyword_arguments_reach_the_hooks_that_ask_for_them() -> None:
    base, model, case = build("roberta"), with_inducer_and_lora("roberta"), inputs("roberta")
    given: list[list[str]] = []
    for each in (base, model):
        names: list[str] = []
        inner = each.roberta.encoder.layer[0].attention.self
        inner.register_forward_pre_hook(
            lambda m, a, k, n=names: n.extend(sorted(k)), with_kwargs=True
        )
        inner.register_forward_hook(
            lambda m, a, k, o, n=names: n.extend(sorted(k)), with_kwargs=True
        )
        logits(each, case)
        given.append(names)
    assert given[0] == given[1] != []


def test_a_pre_hook_that_returns_no_pair_is_refused_as_in_the_base() -> None:
    for each in (build("roberta"), with_inducer_and_lora("roberta")):
        inner = each.roberta.encoder.layer[0].attention.self
        inner.register_forward_pre_hook(lambda m, a, k: a, with_kwargs=True)
        with pytest.raises(RuntimeError, match="must return None or a tuple"):
            logits(each, inputs("roberta"))


def test_hooks_of_the_old_kind_fire() -> None:
    seen = []
    for each in pair(Wrapped):
        found: list[Tensor] = []
        each.inner.register_backward_hook(lambda m, i, o, f=found: f.append(o[0]))
        with pytest.warns(FutureWarning, match="non-full backward hook"):
            each(tokens().requires_grad_()).sum().backward()
        seen.append(found)
    assert len(seen[0]) == len(seen[1]) == 1
    torch.testing.assert_close(seen[1][0], seen[0][0])


@pytest.mark.parametrize("everywhere", [False, True])
def test_hooks_that_are_always_called_run_after_an_exception(everywhere: bool) -> None:
    counts = []
    for each in pair(Wrapped):
        called: list[str] = []

        def note(module: nn.Module, args: Any, output: Any, called: list[str] = called) -> None:
            called.append(type(module).__name__)

        each(tokens())
        if everywhere:
            handle = nn.modules.module.register_module_forward_hook(note, always_call=True)
        else:
            handle = each.inner.register_forward_hook(note, always_call=True)
        projection = next(m for m in each.inner.modules() if isinstance(m, nn.Linear))
        broken = projection.register_forward_pre_hook(lambda m, a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            each(tokens())
        broken.remove()
        after_error = sorted(set(called))
        called.clear()
        each(tokens())  # nothing is left over from the call that failed
        handle.remove()
        counts.append((after_error, len([c for c in called if c == type(each.inner).__name__])))
    assert counts[0] == counts[1]
    assert counts[0][0] != []


def test_an_always_called_hook_runs_if_a_pre_hook_fails_and_leaves_nothing_behind() -> None:
    logs = []
    for each in pair(Wrapped):
        seen: list[bool] = []
        each.inner.register_forward_hook(
            lambda m, a, o, seen=seen: seen.append(o is None), always_call=True
        )
        failing = each.inner.register_forward_pre_hook(lambda m, a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            each(tokens())
        failing.remove()
        logs.append(seen)
    assert logs[0] == logs[1] == [True]
    assert _entered.stack == []


def test_a_hook_that_is_removed_or_registered_during_the_forward_counts_as_in_the_base() -> None:
    logs = []
    for each in pair(Wrapped):
        seen: list[str] = []
        handle = each.inner.register_forward_hook(
            lambda m, a, o, seen=seen: seen.append("removed"), always_call=True
        )
        projection = next(m for m in each.inner.modules() if isinstance(m, nn.Linear))
        projection.register_forward_pre_hook(lambda m, a, handle=handle: handle.remove())
        each(tokens())
        logs.append(seen)
    assert logs[0] == logs[1]
    assert _entered.stack == []
