"""Tell methods what ``Trainer`` does.

    Trainer                     a method's
    on_train_begin              on_train_start
    on_pre_optimizer_step       extra_loss
    on_optimizer_step           on_step

``Trainer`` computes the loss itself, so the gradient of an extra loss is added to what it has
accumulated and clipped, once an optimizer step. No autograd hook of DDP sees it: it is the same in
each process.

Weight decay spares what modules name (``no_weight_decay``), and rows of an embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from surgery.adapter.optimizer_groups import own_rates, undecayed
from surgery.adapter.row_training import trained_rows
from surgery.adapter.training_run import extra_loss, start, stepped, trained
from surgery.errors import MethodError
from surgery.interop import huggingface, spare_from_decay
from surgery.plugin import overridden
from surgery.splicer import reports, spliced_model


def follow_trainers(model: nn.Module) -> None:
    """Let every ``Trainer`` made from now on call the hooks of the spliced models that it trains.

    It imports ``Trainer`` where a method of this model has such a hook.
    """
    spare_from_decay(_undecayed)
    hooks = {name for report in reports(model).values() for m in report.methods
             for name in overridden(m)}  # fmt: skip
    if hooks - {"fit"} or own_rates(model):
        huggingface.follow_trainers(TRAINER_EVENTS, load=True)


def _undecayed(model: nn.Module) -> list[nn.Parameter]:
    """Return what ``Trainer`` must not decay of a spliced model; nothing of any other."""
    whole = spliced_model(model)
    if not reports(whole) and not trained_rows(whole):
        return []
    own, names = dict(whole.named_parameters()), undecayed(whole)
    return [p for name, p in own.items() if name in names]


def _begun(model: nn.Module, args: Any, state: Any, optimizer: Any) -> None:
    if not reports(spliced_model(model)):
        return
    scaled = getattr(args, "fp16", False) and not args.max_grad_norm
    if scaled and any(True for _ in trained(model, "extra_loss")):
        raise MethodError(
            "an extra_loss in fp16 needs gradients that the clipping has unscaled. Set "
            "max_grad_norm above 0, or train in bf16."
        )
    _require_rates(model, optimizer)
    start(model, state.max_steps)


def _add_gradients(model: nn.Module, args: Any, state: Any, optimizer: Any) -> None:
    with torch.enable_grad():
        loss = extra_loss(model) if reports(spliced_model(model)) else 0.0
    if isinstance(loss, float) or not loss.requires_grad:
        return
    found = [p for p in model.parameters() if p.requires_grad]
    for p, grad in zip(found, torch.autograd.grad(loss, found, allow_unused=True), strict=True):
        if grad is not None:
            p.grad = grad if p.grad is None else p.grad + grad


def _stepped(model: nn.Module, args: Any, state: Any, optimizer: Any) -> None:
    if reports(spliced_model(model)):
        stepped(model, state.global_step + 1)


TRAINER_EVENTS = {
    "on_train_begin": _begun,
    "on_pre_optimizer_step": _add_gradients,
    "on_optimizer_step": _stepped,
}


def _require_rates(model: nn.Module, optimizer: Any) -> None:
    """Raise if an optimizer has one rate, and modules give several."""
    groups = [] if optimizer is None else optimizer.param_groups
    if len({group.get("initial_lr", group["lr"]) for group in groups}) != 1:
        return
    for name, times in own_rates(model).items():
        if times != 1:
            raise MethodError(
                f"{name} learns at {times} times the rate (learning_rates), and the optimizer of "
                "this Trainer has one rate. Pass optimizers=(torch.optim.AdamW("
                "surgery.parameter_groups(model, lr=...)), None)."
            )
