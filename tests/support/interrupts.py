"""Raise KeyboardInterrupt at one line of a call, and describe what a model is, to compare."""

from __future__ import annotations

import gc
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import surgery
from surgery.host import containers, foreign_forward
from surgery.interop import capturing, random_streams
from surgery.splicer import look_up, reports

_FILES = str(Path(surgery.__file__).parent)


Line = tuple[str, int]  # file, number
Place = tuple[Line, int]  # a line of the library, and the how-many-eth time it runs


class _Lines:
    """Counts how often each line of the library's files runs."""

    def __init__(self) -> None:
        self.counts = Counter[Line]()

    def __call__(self, frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_FILES):
            return None
        if event == "line":
            self.counts[frame.f_code.co_filename, frame.f_lineno] += 1
        return self


class _Interrupt:
    """Raises at one place; looks at no code beside that of its line."""

    def __init__(self, at: Place) -> None:
        (self.file, self.line), self.left = at

    def __call__(self, frame: Any, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != self.file:
            return None
        if event == "line" and frame.f_lineno == self.line:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


def places(count: int, act: Callable[..., Any], *args: Any) -> list[Place]:
    """Return places of a call to interrupt it at: each line once, before any a second time.

    Lines that end something run seldom, and matter as much as those of a loop.
    """
    lines = _Lines()
    sys.settrace(lines)
    try:
        act(*args)
    finally:
        sys.settrace(None)
    draw = random.Random(0)
    once = [(line, draw.randint(1, n)) for line, n in lines.counts.items()]
    draw.shuffle(once)
    again = draw.choices(list(lines.counts), list(lines.counts.values()), k=count)
    return [*once, *((line, draw.randint(1, lines.counts[line])) for line in again)][:count]


def interrupted(at: Place, act: Callable[..., Any], *args: Any) -> bool:
    """Interrupt a call at a place; False if the call ended before."""
    sys.settrace(_Interrupt(at))
    try:
        act(*args)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def description(model: nn.Module) -> dict[str, Any]:
    """What a user can tell of a model: classes, attributes, hooks, weights, splices."""
    return {
        "splices": {
            name: [i.path for i in report.inserted] for name, report in reports(model).items()
        },
        "on": look_up(model).switches.default.key,
        "names": look_up(model).switches.names,
        "classes": {path: type(m) for path, m in model.named_modules()},
        "attributes": {path: sorted(vars(m)) for path, m in model.named_modules()},
        "weights": {n: (t.tolist(), t.dtype) for n, t in model.state_dict().items()},
        "trained": {n: p.requires_grad for n, p in model.named_parameters()},
        "rows": {n: len(p._backward_hooks or ()) for n, p in model.named_parameters()},
        "training": {path: m.training for path, m in model.named_modules()},
        "hooks": {path: len(m._forward_hooks) for path, m in model.named_modules()},
    }


def process() -> dict[str, Any]:
    """What an operation must leave in the process as it was."""
    seen: list[int] = []
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda *_: seen.append(1))
    layer(torch.ones(1, 2))
    return {
        "replaced": [n for n, f in vars(torch).items() if hasattr(f, "original")],
        "call": nn.Module.__call__,
        "training": "training" in vars(nn.Module),
        "hook fires": bool(seen),
        "collector": (gc.isenabled(), gc.get_threshold()),
        "trace": sys.gettrace(),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "torch function": torch._C._is_torch_function_enabled(),
        "function modes": len(_get_current_function_mode_stack()),
        "dispatch modes": len(_get_current_dispatch_mode_stack()),
        "capturing": capturing(),
        "generators": random_streams._thread.generators,
        "hidden hosts": len(containers._running.hosts),
        "entered": dict(foreign_forward._calls.depth),
    }
