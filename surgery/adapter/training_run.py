"""Call what methods do while a model trains, in a loop of one's own.

    life = life_cycle(model, steps)    a method's on_train_start
    loss + life.extra_loss()           extra_loss
    life.step()                        on_step

The hooks of a splice are called while it trains: if one of its parameters requires a gradient, or
if it has none. ``Trainer`` is told in trainer_events.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from surgery.errors import MethodError, SpliceError, shown
from surgery.plugin import Method, bound, overridden
from surgery.splicer import reports, require_spliced, spliced_model


class LifeCycle:
    """A training run of a spliced model, seen by its methods. Made by ``surgery.life_cycle``.

    Attributes:
        model: the spliced model.
        total_steps: how many steps the optimizer makes in all.
        steps: how many it has made.

    Example:
        ``surgery.life_cycle(model, total_steps=100).total_steps``
    """

    def __init__(self, model: nn.Module, total_steps: int, steps: int) -> None:
        self.model, self.total_steps, self.steps = model, total_steps, steps

    def extra_loss(self) -> Tensor | float:
        """Return the sum of what the methods add to a loss; 0.0 if they add nothing."""
        return extra_loss(self.model)

    def step(self) -> None:
        """Tell the methods that the optimizer has stepped. Call it before gradients are zeroed."""
        self.steps += 1
        stepped(self.model, self.steps)


def life_cycle(model: nn.Module, total_steps: int, steps: int = 0) -> LifeCycle:
    """Begin a training run: call ``on_train_start`` of the methods that are trained.

    Args:
        model: a spliced model; call ``freeze_base`` first.
        total_steps: how many steps the optimizer will make, those before an interruption included.
        steps: how many it has made before, where a run is resumed.

    Raises:
        SpliceError: nothing is spliced in, or a number is out of range.

    Example:
        >>> life = surgery.life_cycle(model, total_steps=len(batches))
        >>> for batch in batches:
        ...     (model(**batch).loss + life.extra_loss()).backward()
        ...     optimizer.step()
        ...     life.step()
        ...     optimizer.zero_grad()

    With transformers' ``Trainer`` there is nothing to call.
    """
    require_spliced(spliced_model(model))
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (total_steps, steps))
    if not whole or not 0 <= steps <= total_steps or total_steps < 1:
        raise SpliceError(
            f"life_cycle: total_steps={shown(total_steps)}, steps={shown(steps)} must be whole "
            "numbers, the first 1 or more, the second between 0 and the first."
        )
    start(model, total_steps)
    return LifeCycle(model, total_steps, steps)


def extra_loss(model: nn.Module) -> Tensor | float:
    """Return the sum of the extra losses of the methods that are trained; 0.0 without one."""
    total: Tensor | float = 0.0
    for _, method in trained(model, "extra_loss"):
        loss = method.extra_loss()
        if loss is None:
            continue
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise MethodError(
                f"method {method.name!r}: extra_loss returned {shown(loss)}, not one number as a "
                "tensor. Return a scalar with a gradient, or None."
            )
        total = total + loss.squeeze()
    return total


def start(model: nn.Module, total_steps: int) -> None:
    """Tell the methods that are trained that a training run begins."""
    for _, method in trained(model, "on_train_start"):
        method.on_train_start(spliced_model(model), total_steps)


def stepped(model: nn.Module, step: int) -> None:
    """Tell the methods that are trained that the optimizer has made this step."""
    with torch.no_grad():
        for _, method in trained(model, "on_step"):
            method.on_step(step)


def trained(model: nn.Module, hook: str) -> Iterator[tuple[str, Method]]:
    """Yield the methods that override a hook, of the splices that train, with their modules."""
    model = spliced_model(model)
    for report in reports(model).values():
        modules = {i.path: model.get_submodule(i.path) for i in report.inserted}
        own = [p for module in modules.values() for p in module.parameters()]
        if own and not any(p.requires_grad for p in own):
            continue
        for method in report.methods:
            if hook in overridden(method):
                paths = dict.fromkeys(i.path for i in report.inserted if i.method == method)
                yield report.name, bound(method, [modules[path] for path in paths])
