"""Merging: fold what is linear into the base's weights, and undo it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from surgery.adapter.merge_plan import MergePlan
from surgery.errors import SpliceError
from surgery.splicer import Inserted, forget, reports, require_spliced


@dataclass
class Merged:
    """What ``merge`` did. Print it; as long as it is held, :meth:`undo` can put back the weights.

    Attributes:
        folded: the modules that are gone.  left: those that are still spliced.
        originals: the weights as they were, by name.
    """

    folded: list[Inserted] = field(default_factory=list)
    left: list[Inserted] = field(default_factory=list)
    originals: dict[str, Tensor] = field(default_factory=dict, repr=False)
    written: dict[str, list[float]] = field(default_factory=dict, repr=False)  # sums of the new

    def undo(self, model: nn.Module) -> None:
        """Give the base its own weights back, bit for bit. (What was folded is not spliced again:
        load the adapter for that.)

        Raises:
            SpliceError: one of them is not what this merge made of it, as another merge changed it.
        """
        own = dict(model.named_parameters())
        since = [n for n, sums in self.written.items() if sums_of(own[n]) != sums]
        if since:
            raise SpliceError(
                f"{since[0]} has changed since this merge. Undo later merges first, the last one "
                "before the others."
            )
        with torch.no_grad():
            for name, tensor in self.originals.items():
                own[name].copy_(tensor)

    def __repr__(self) -> str:
        text = f"folded {len(self.folded)} modules into {len(self.originals)} weights and biases"
        names = sorted({i.method.name for i in self.left})
        return text + (f"; still spliced: {', '.join(names)}" if names else "")


def sums_of(x: Tensor) -> list[float]:
    """Three sums by which a tensor is told from another."""
    wide = x.detach().double().flatten()
    ramp = torch.linspace(0, 1, wide.numel(), dtype=wide.dtype, device=wide.device)
    return [float(wide.sum()), float(wide.square().sum()), float((wide * ramp).sum())]


def merge(model: nn.Module, name: str | None = None, partial: bool = False) -> Merged:
    """Fold one splice, or all, into the base's weights; outputs stay what they are.

    Args:
        model: a spliced model.
        name: of the splice; all of them if None.
        partial: leave spliced what cannot be folded, instead of refusing.

    Returns:
        what was folded, what is left, and the original weights.

    Raises:
        SpliceError: something cannot be folded; the method and the reason are named, and nothing
            has changed.
    """
    names = list(reports(model)) if name is None else [name]
    require_spliced(model, names)
    stay: dict[str, str] = {}  # modules that others are in the way of, and how
    while new := (plan := MergePlan(model, names, partial, stay)).conflicts():
        stay |= new
    own = dict(model.named_parameters(remove_duplicate=False))
    merged = Merged(plan.whole, plan.left + plan.parts)
    merged.originals = {n: own[n].detach().clone() for n in plan.weights}
    with torch.no_grad():
        for n, tensor in plan.weights.items():
            own[n].copy_(tensor)
            merged.written[n] = sums_of(own[n])
        for inserted in plan.parts:
            model.get_submodule(inserted.path).rest()  # type: ignore[operator]
    for report in [reports(model)[n] for n in names]:
        forget(model, report, {i.path for i in plan.whole})
    return merged
