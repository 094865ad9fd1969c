"""Group what is trained for an optimizer: rates and weight decay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from surgery.adapter.row_training import trained_rows
from surgery.errors import SpliceError
from surgery.plugin import NamesFast, NamesRates, NamesUndecayed


def parameter_groups(
    model: nn.Module, lr: float, b_ratio: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return the trained parameters of a model in the groups that a torch optimizer takes.

        rate of B = b_ratio * lr          LoRA+ (Hayou et al. 2024, arXiv:2402.12354): 16, say

    A parameter that a module's ``learning_rates()`` names learns at so many times the rate.

    Weight decay leaves alone what a module's ``no_weight_decay()`` names, every parameter of fewer
    than two dimensions, such as a bias, a scale or the weight of a norm, and parameters of which
    single rows are trained: decay would move the other rows too.

    Args:
        model: a spliced model; call ``freeze_base`` first.
        lr: the learning rate.
        b_ratio: how many times as large the rate of LoRA's second factor B is; a module's
            ``fast_parameters()`` names it.
        weight_decay: that of the parameters that decay.

    Raises:
        SpliceError: nothing is trained, or a number is out of range.

    Example:
        ``Trainer(model, args, optimizers=(torch.optim.AdamW(groups), None))``
    """
    if not (lr > 0 and b_ratio > 0 and weight_decay >= 0):
        raise SpliceError(
            f"lr={lr}, b_ratio={b_ratio}, weight_decay={weight_decay}: the first two must be "
            "above 0, the last 0 or more."
        )
    fast = set(_named(model, NamesFast, "fast_parameters"))
    times = own_rates(model)
    spared = undecayed(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() > 1 and name not in spared
            rate = (lr * b_ratio if name in fast else lr) * times.get(name, 1.0)
            key = (rate, weight_decay if decays else 0.0)
            groups.setdefault(key, []).append(parameter)
    if not groups:
        raise SpliceError(f"no parameter of this {type(model).__name__} requires a gradient.")
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def undecayed(model: nn.Module) -> set[str]:
    """Return the parameters that modules spare from weight decay, and those trained in rows."""
    return {*_named(model, NamesUndecayed, "no_weight_decay"), *trained_rows(model)}


def _named(model: nn.Module, protocol: type, offer: str) -> Iterator[str]:
    """Yield the parameters that the modules of a model name by a method of theirs."""
    for path, module in model.named_modules():
        if isinstance(module, protocol):
            for name in getattr(module, offer)():
                yield f"{path}.{name}" if path else name


def own_rates(model: nn.Module) -> dict[str, float]:
    """Return by parameter how many times as large its rate is, where a module says so."""
    found = {}
    for path, module in model.named_modules():
        for name, times in (
            module.learning_rates().items() if isinstance(module, NamesRates) else ()
        ):
            if name not in dict(module.named_parameters()) or not 0 < times < float("inf"):
                raise SpliceError(
                    f"{path}: learning_rates() gives {name!r} {times} times the rate. It must name "
                    "parameters of this module, and numbers above 0."
                )
            found[f"{path}.{name}" if path else name] = float(times)
    return found
