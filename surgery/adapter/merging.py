"""Merge: fold inserted modules into the weights of the base, and undo it.

    merge(model)
      MergePlan   new weights in float64; planned again while modules that stay hold others back
      write       each weight rounded once to its dtype, the original kept
      rest        partly folded modules drop the part that has been folded
      forget      folded modules are taken out, and hosts with no edit left are restored
    -> Merged     .undo(model) writes the originals back
    unmerge(model, merged)   does, and splices the folded modules in again

All checks are part of the plan: a merge that is refused has changed nothing. One that is
interrupted is undone, to the bits of every weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from surgery.adapter.dequantizing import dequantized
from surgery.adapter.merged_weights import MergePlan
from surgery.errors import SpliceError
from surgery.interop import deliver, huggingface, out_of_reach, stored_parameters
from surgery.splicer import (
    Before,
    Inserted,
    Spliced,
    atomically,
    forget,
    look_up,
    reports,
    require_spliced,
    spliced_model,
)


@dataclass
class Merged:
    """The result of ``surgery.merge``. Print it; keep it for :meth:`undo` or ``surgery.unmerge``.

    Attributes:
        folded: the modules that were folded whole and taken out.
        left: the modules that are still spliced in.
        originals: copies of the weights before the merge, by name.
        written: sums of the weights that the merge wrote, by which ``undo`` knows them again.
        untied: parameters that the merge untied, by name: what stood there before.
        tied: whether the configuration of the model called them tied.
        dequantized: layers that the merge replaced by plain ones, by path: what stood there before.
        errors: how far each of those is from the quantised one, relative to its output.
        before: what was spliced in before the merge.
        values: the tensors of the modules that were folded in part, as they were.
        after: the paths of what was still spliced in right after the merge.

    Example:
        ``merged = surgery.merge(model)``; ``merged.undo(model)`` puts the weights back
    """

    folded: list[Inserted] = field(default_factory=list)
    left: list[Inserted] = field(default_factory=list)
    originals: dict[str, Tensor] = field(default_factory=dict, repr=False)
    written: dict[str, list[float]] = field(default_factory=dict, repr=False)
    untied: dict[str, nn.Parameter] = field(default_factory=dict, repr=False)
    tied: bool = field(default=False, repr=False)
    dequantized: dict[str, nn.Module] = field(default_factory=dict, repr=False)
    errors: dict[str, float] = field(default_factory=dict)
    before: Spliced | None = field(default=None, repr=False)
    values: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)
    after: list[str] = field(default_factory=list, repr=False)

    def undo(self, model: nn.Module) -> None:
        """Give the base its original weights back, bit for bit.

        The folded modules are not spliced in again; ``surgery.unmerge`` does that.

        Raises:
            SpliceError: a weight has changed since the merge, as by a later merge.
        """
        self._require_unchanged(model)
        atomically(model, lambda before: self._write_back(model, before))

    def _require_unchanged(self, model: nn.Module) -> None:
        own = stored_parameters(model)
        since = [n for n, sums in self.written.items() if n not in own or sums_of(own[n]) != sums]
        if since:
            raise SpliceError(
                f"{since[0]} has changed since this merge. Undo later merges first, beginning with "
                "the last one."
            )

    def _write_back(self, model: nn.Module, before: Before) -> None:
        own = stored_parameters(model)
        kept = {n: t for n, t in self.originals.items() if n not in self.untied}
        before.note(own[name] for name in kept)
        with torch.no_grad():
            for name, tensor in kept.items():
                own[name].copy_(tensor)
        for name, tied in self.untied.items():
            _put(model, name, tied)
        for path, layer in self.dequantized.items():
            _put(model, path, layer)
        if self.tied:
            huggingface.set_tied(model, True)

    def __repr__(self) -> str:
        text = f"folded {len(self.folded)} modules into {len(self.originals)} weights and biases"
        if self.errors:
            worst = max(self.errors.values())
            text += f"; dequantised {len(self.errors)} layers, off by up to {worst:.2g}"
        names = sorted({i.method.name for i in self.left})
        return text + (f"; still spliced: {', '.join(names)}" if names else "")


def sums_of(x: Tensor) -> list[float]:
    """Return the sums of x, x^2 and x times a ramp; two tensors hardly ever agree in all three."""
    wide = x.detach().double().flatten()
    ramp = torch.linspace(0, 1, wide.numel(), dtype=wide.dtype, device=wide.device)
    return [float(wide.sum()), float(wide.square().sum()), float((wide * ramp).sum())]


def merge(
    model: nn.Module,
    name: str | None = None,
    partial: bool = False,
    untie: bool = False,
    dequantize: bool = False,
) -> Merged:
    """Fold one splice, or all, into the base's weights. Outputs stay the same, up to rounding.

    Args:
        model: a spliced model.
        name: the name of the splice; None means all that are on.
        partial: leave in place what cannot be folded, instead of raising.
        untie: give a weight that is tied to another, as an embedding to the head, a copy of its
            own first; the twin stays as it is. ``config.tie_word_embeddings`` becomes False.
        dequantize: put a plain linear layer in the place of a quantised one first;
            ``Merged.errors`` says how far it is from what it replaces. It takes more memory.

    Returns:
        the folded modules, those that are left, and the original weights.

    Raises:
        SpliceError: a module cannot be folded, or a splice is off or scaled; the message names the
            method and the reason. Nothing has changed.

    Example:
        ``merged = surgery.merge(model)``; ``surgery.unmerge(model, merged)``
    """
    model = spliced_model(model)
    require_spliced(model, *([] if name is None else [name]))
    names = _on(model, name)
    reason = out_of_reach(model, but_in_memory=not (untie or dequantize))
    if reason:
        raise SpliceError(f"nothing can be merged into this {type(model).__name__}: {reason}")
    allowed = partial, untie, dequantize
    return atomically(model, lambda before: _merge(model, names, *allowed, before))


def _on(model: nn.Module, name: str | None) -> list[str]:
    """Return the splices to fold; raise if one does not run as it would be folded."""
    choice = look_up(model).switches.default
    names = [n for n in reports(model) if choice.has(n)] if name is None else [name]
    wrong = [n for n in names if not choice.has(n) or n in choice.shares]
    if wrong or not names:
        which = f"splice {wrong[0]!r}" if wrong else "every splice"
        state = "on in part" if wrong and choice.has(wrong[0]) else "switched off"
        raise SpliceError(
            f"{which} is {state}, so the merged model would compute something else. Switch on what "
            "is to be merged with surgery.use, or remove it."
        )
    return names


def _merge(
    model: nn.Module, names: list[str], partial: bool, untie: bool, dequantize: bool, before: Before
) -> Merged:
    """Plan, write the weights, and take out what is folded."""
    spliced = Spliced.into(model)
    replaced, errors = _dequantize(model, names) if dequantize else ({}, {})
    stay: dict[str, str] = {}  # paths of modules that others hold back, and why
    while new := (plan := MergePlan(model, names, partial, stay, untie, replaced)).conflicts():
        stay |= new
    merged = Merged(plan.whole, plan.left + plan.parts, before=spliced)
    merged.dequantized, merged.errors = replaced, errors
    merged.untied = {n: plan.parameters[n] for n in plan.untied if n in plan.weights}
    for n, tied in merged.untied.items():
        copy = nn.Parameter(tied.detach().clone(), tied.requires_grad)
        huggingface.call_loaded([copy])
        _put(model, n, copy)
    own = stored_parameters(model)
    merged.originals = {n: own[n].detach().clone() for n in plan.weights}
    partly = {i.path: model.get_submodule(i.path) for i in plan.parts}
    merged.values = {
        path: {n: t.detach().clone() for n, t in module.state_dict().items()}
        for path, module in partly.items()
    }
    before.note(own[n] for n in plan.weights)
    before.note(tensor for module in partly.values() for tensor in module.state_dict().values())
    with torch.no_grad():
        for n, tensor in plan.weights.items():
            deliver()
            own[n].copy_(tensor)
            merged.written[n] = sums_of(own[n])
        for module in partly.values():
            module.rest()  # type: ignore[operator]
    for report in [reports(model)[n] for n in names]:
        forget(model, report, {i.path for i in plan.whole})
    merged.after = _inserted(model)
    merged.tied = bool(merged.untied) and huggingface.set_tied(model, False)
    return merged


def unmerge(model: nn.Module, merged: Merged) -> nn.Module:
    """Undo a merge: the base's weights to the bits, and what was folded is spliced in again.

    Args:
        merged: what ``surgery.merge`` returned.

    Raises:
        SpliceError: a weight has changed since the merge, or something was spliced in or taken out.
            Nothing has changed.

    Example:
        ``merged = surgery.merge(model)``, then ``surgery.unmerge(model, merged)``
    """
    merged._require_unchanged(model)
    if _inserted(model) != merged.after or merged.before is None:
        raise SpliceError(
            f"what is spliced into this {type(model).__name__} has changed since this merge. Undo "
            "that first; merged.undo(model) gives the weights back alone."
        )
    spliced = merged.before

    def put_back(before: Before) -> None:
        merged._write_back(model, before)
        for i in merged.folded:  # the model may have been moved since
            host = model.get_submodule(i.site.path)
            device = next((p.device for p in host.parameters()), torch.device("meta"))
            if device.type != "meta":
                spliced.modules[i.path].to(device)
        for path, values in merged.values.items():
            own = spliced.modules[path].state_dict()
            before.note(own.values())
            with torch.no_grad():
                for name, tensor in values.items():
                    own[name].copy_(tensor)
        spliced.put_back(model)

    atomically(model, put_back)
    return model


def _inserted(model: nn.Module) -> list[str]:
    """Return the paths of all inserted modules, in order."""
    return [i.path for report in reports(model).values() for i in report.inserted]


def _dequantize(
    model: nn.Module, names: list[str]
) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """Replace the quantised layers that have a module of these splices behind or before them.

    Returns:
        the layers that stood there, and the errors, by path.
    """
    replaced: dict[str, nn.Module] = {}
    errors: dict[str, float] = {}
    for i in (i for n in names for i in reports(model)[n].inserted):
        port = i.site.port(i.edit.port)
        if port.weight or not port.module or port.in_width is None or port.module in replaced:
            continue
        layer = model.get_submodule(port.module)
        dtype = i.site.dtype
        plain, errors[port.module] = dequantized(layer, port.in_width, port.module, dtype)
        replaced[port.module] = layer
        huggingface.call_loaded(plain.parameters())
        _put(model, port.module, plain)
    return replaced, errors


def _put(model: nn.Module, name: str, thing: nn.Module | nn.Parameter) -> None:
    """Set a module or parameter of a model by its dotted name."""
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, thing)
