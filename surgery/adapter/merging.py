"""Merge: fold inserted modules into the weights of the base, and undo it.

    merge(model)
      MergePlan   new weights in float64; planned again while modules that stay hold others back
      write       each weight rounded once to its dtype, the original kept
      rest        partly folded modules drop the part that has been folded
      forget      folded modules are taken out, and hosts with no edit left are restored
    -> Merged     .undo(model) writes the originals back

All checks are part of the plan: a merge that is refused has changed nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from surgery.adapter.merged_weights import MergePlan
from surgery.errors import SpliceError
from surgery.interop import out_of_reach
from surgery.splicer import Inserted, forget, reports, require_spliced


@dataclass
class Merged:
    """The result of ``surgery.merge``. Print it, or keep it for :meth:`undo`.

    Attributes:
        folded: the modules that were folded whole and taken out.
        left: the modules that are still spliced in.
        originals: copies of the weights before the merge, by name.
        written: sums of the weights that the merge wrote, by which ``undo`` knows them again.
    """

    folded: list[Inserted] = field(default_factory=list)
    left: list[Inserted] = field(default_factory=list)
    originals: dict[str, Tensor] = field(default_factory=dict, repr=False)
    written: dict[str, list[float]] = field(default_factory=dict, repr=False)

    def undo(self, model: nn.Module) -> None:
        """Give the base its original weights back, bit for bit.

        The folded modules are not spliced in again; load the adapter for that.

        Raises:
            SpliceError: a weight has changed since the merge, as by a later merge.
        """
        own = dict(model.named_parameters())
        since = [n for n, sums in self.written.items() if sums_of(own[n]) != sums]
        if since:
            raise SpliceError(
                f"{since[0]} has changed since this merge. Undo later merges first, beginning with "
                "the last one."
            )
        with torch.no_grad():
            for name, tensor in self.originals.items():
                own[name].copy_(tensor)

    def __repr__(self) -> str:
        text = f"folded {len(self.folded)} modules into {len(self.originals)} weights and biases"
        names = sorted({i.method.name for i in self.left})
        return text + (f"; still spliced: {', '.join(names)}" if names else "")


def sums_of(x: Tensor) -> list[float]:
    """Return the sums of x, x^2 and x times a ramp; two tensors hardly ever agree in all three."""
    wide = x.detach().double().flatten()
    ramp = torch.linspace(0, 1, wide.numel(), dtype=wide.dtype, device=wide.device)
    return [float(wide.sum()), float(wide.square().sum()), float((wide * ramp).sum())]


def merge(model: nn.Module, name: str | None = None, partial: bool = False) -> Merged:
    """Fold one splice, or all, into the base's weights. Outputs stay the same, up to rounding.

    Args:
        model: a spliced model.
        name: the name of the splice; None means all.
        partial: leave in place what cannot be folded, instead of raising.

    Returns:
        the folded modules, those that are left, and the original weights.

    Raises:
        SpliceError: a module cannot be folded; the message names the method and the reason.
            Nothing has changed.
    """
    names = list(reports(model)) if name is None else [name]
    require_spliced(model, names)
    reason = out_of_reach(model)
    if reason:
        raise SpliceError(f"nothing can be merged into this {type(model).__name__}: {reason}")
    stay: dict[str, str] = {}  # paths of modules that others hold back, and why
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
