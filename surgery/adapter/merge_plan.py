"""Merge: fold inserted modules into the weights of the base, where that is exact.

A port is made by a projection, y = x W + b. A module whose effect on y is again of that form says
so with one method, and ``merge`` computes the new W and b in float64 and rounds them once:

    fold(weight, bias) -> (weight, bias)     behind the projection: add, insert, replace
    fold_input(weight) -> weight             in front of it: feed

W is (in, out), only the columns of the port if the projection is fused; b is None where there is
none, and what there is besides the projection's own bias if the module reads that. A module that
can be folded in part only (the inducer's b2) also has ``rest()``, which takes that part out of it;
one that has a bias of its own to fold says ``needs_bias = True``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SpliceError
from surgery.plugin import (
    Edit,
    Foldable,
    FoldableInput,
    NeedsBias,
    PartlyFoldable,
    Port,
    Site,
    frozen_inside,
    referred,
)
from surgery.splicer import Inserted, reports


def _one(a: Tensor, b: Tensor) -> bool:
    """Are these one parameter, or two in one place, as ``load_state_dict(assign=True)`` ties?"""
    return a is b or (a.data_ptr() == b.data_ptr() != 0 and a.numel() > 0)


class MergePlan:
    """The new weights, and which modules they make superfluous. Nothing is changed here."""

    def __init__(
        self, model: nn.Module, names: list[str], partial: bool, stay: dict[str, str]
    ) -> None:
        self.model, self.partial, self.stay = model, partial, stay
        self.own = dict(model.named_parameters(remove_duplicate=False))
        self.weights: dict[str, Tensor] = {}
        self.whole: list[Inserted] = []
        self.parts: list[Inserted] = []
        self.left: list[Inserted] = []
        ports: dict[tuple[Any, str], list[tuple[Inserted, bool]]] = {}
        for report in reports(model).values():
            for i in report.inserted:
                place = (i.site.identity, i.edit.port)
                ports.setdefault(place, []).append((i, report.name in names))
        self.refused: set[str] = set()
        for entries in ports.values():
            self.fold(entries)

    def fold(self, entries: list[tuple[Inserted, bool]]) -> None:
        """Fold what was chosen at one port."""
        why: dict[str, str] = {}
        for _ in range(len(entries) + 1):  # what is refused stays, and may be in others' way
            why = {i.path: self.why_not(i, entries) for i, chosen in entries if chosen}
            self.refused |= {path for path, reason in why.items() if reason}
        refused = [i for i, chosen in entries if chosen and why[i.path]]
        if refused and not self.partial:
            first = refused[0]
            raise SpliceError(
                f"method {first.method.name!r} at {first.site.path} cannot be merged: "
                f"{why[first.path]}. Nothing has changed; merge(..., partial=True) leaves it "
                "spliced and folds the rest."
            )
        self.left += refused
        chosen = [i for i, _ in entries if why.get(i.path) == ""]
        if chosen:
            self.compute(chosen)

    def conflicts(self) -> dict[str, str]:
        """What cannot go because of what stays, by path, and why."""
        gone = {i.path for i in self.whole}
        every = [i for report in reports(self.model).values() for i in report.inserted]
        staying = [(i, self.model.get_submodule(i.path)) for i in every if i.path not in gone]
        found: dict[str, str] = {}
        for i in [*self.whole, *self.parts]:
            own = set(self.model.get_submodule(i.path).modules())
            port = i.site.port(i.edit.port)
            for other, module in staying:
                if i.path in gone and not own.isdisjoint(referred(module)):
                    found[i.path] = f"{other.method.name!r} at {other.site.path} uses a part of it"
                for name in (n for n in (port.weight, port.bias) if n in self.own):
                    if any(frozen.reads(self.own[name]) for frozen in frozen_inside(module)):
                        found[i.path] = f"{other.method.name!r} reads {name} as the base has it"
        return {path: why for path, why in found.items() if path not in self.stay}

    def compute(self, chosen: list[Inserted]) -> None:
        """The projection's weight and bias with these modules folded in."""
        port = chosen[0].site.port(chosen[0].edit.port)
        weight, bias = self.stored(port.weight), self.stored(port.bias)
        at: Any = slice(None) if port.columns is None else torch.tensor(port.columns)
        matrix = weight.T if port.transposed and weight is not None else weight
        w = matrix[:, at] if matrix is not None else None
        b = bias[at] if bias is not None else None
        raw = None if b is None else b.clone()
        feeds = [i for i in chosen if i.edit.verb == "feed"]
        behind = [i for i in chosen if i.edit.verb != "feed"]
        for inserted in [*reversed(feeds), *behind]:
            module: Any = self.model.get_submodule(inserted.path)
            if inserted.edit.verb == "feed":
                w = _folded(inserted, lambda w, b, m=module: (m.fold_input(w), b), w, b)[0]
            elif b is not None and raw is not None and _reads_bias(inserted):
                w, b = _folded(inserted, module.fold, w, b - raw)
                b = None if b is None else raw + b
            else:
                w, b = _folded(inserted, module.fold, w, b)
            (self.parts if isinstance(module, PartlyFoldable) else self.whole).append(inserted)
        for name, merged in ((port.weight, w), (port.bias, b)):
            if merged is not None and not bool(merged.to(self.own[name].dtype).isfinite().all()):
                raise SpliceError(
                    f"{name}: merged, it would have values that are not finite in "
                    f"{self.own[name].dtype}. Nothing has changed; merge a copy in a wider dtype."
                )
        if matrix is not None:
            assert w is not None
            matrix[:, at] = w  # a view: it writes to ``weight``
        if bias is not None:
            assert b is not None
            bias[at] = b

    def stored(self, name: str) -> Tensor | None:
        """The float64 copy of a parameter that the new values gather in."""
        if not name:
            return None
        if name not in self.weights:
            self.weights[name] = self.own[name].detach().double().clone()
        return self.weights[name]

    def why_not(self, inserted: Inserted, entries: list[tuple[Inserted, bool]]) -> str:
        """Why a module cannot be folded; empty if it can."""
        if inserted.path in self.stay:
            return self.stay[inserted.path]
        module, edit = self.model.get_submodule(inserted.path), inserted.edit
        port = inserted.site.port(edit.port)
        if not isinstance(module, _protocol(edit)):
            return "what it does is no linear map of its projection's input"
        if isinstance(module, PartlyFoldable) and not self.partial:
            return "only a part of it is linear"
        if not port.weight and not (inserted.site.kind == "norm" and port.bias):
            return f"port {port.name!r} is not made by one plain floating-point matrix"
        for name in (port.weight, port.bias):
            if name and name not in self.own:
                return f"{name} is a parameter no more (a parametrization makes it, say)"
        if isinstance(module, NeedsBias) and module.needs_bias and not port.bias:
            return f"the projection of port {port.name!r} has no bias to take up its own"
        return self.shared(inserted.site, port) or self.in_the_way(inserted, entries)

    def shared(self, site: Site, port: Port) -> str:
        """Is a weight used elsewhere too?"""
        for name in filter(None, (port.weight, port.bias)):
            tied = self.model.named_parameters(remove_duplicate=False)
            others = [n for n, p in tied if _one(p, self.own[name]) and n != name]
            if others:
                return f"its weight {name} is also {others[0]}, which must stay as it is"
        for other in site.ports.values():
            overlap = other.columns is None or not {*other.columns}.isdisjoint(port.columns or ())
            if other.name != port.name and port.weight and other.weight == port.weight and overlap:
                return f"its weight {port.weight} also makes port {other.name!r}"
        return ""

    def in_the_way(self, inserted: Inserted, entries: list[tuple[Inserted, bool]]) -> str:
        """Does something that stays stand between the projection and this module?"""
        place = next(n for n, (i, _) in enumerate(entries) if i is inserted)
        port = inserted.edit.port
        for number, (other, chosen) in enumerate(entries):
            if number == place or (chosen and self.goes(other)):
                continue
            reads = other.edit.reads
            behind = inserted.edit.verb != "feed"  # in front of the projection nothing else is
            sums = other.edit.verb == inserted.edit.verb == "add" and port not in reads
            if other.edit.verb == "feed" or (behind and number < place and not sums):
                return f"{other.method.name!r} stands before it and stays"
            if behind and f"{port}.bias" in reads:
                return f"{other.method.name!r} reads the bias of {port!r} and stays"
        return ""

    def goes(self, inserted: Inserted) -> bool:
        """Is nothing left of a module, as it is folded whole?"""
        if inserted.path in self.refused:
            return False
        module = self.model.get_submodule(inserted.path)
        return isinstance(module, _protocol(inserted.edit)) and not isinstance(
            module, PartlyFoldable
        )


def _protocol(edit: Edit) -> type:
    """What a module must offer to be folded."""
    return FoldableInput if edit.verb == "feed" else Foldable


def _folded(
    inserted: Inserted, fold: Callable[..., Any], weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """What a module's ``fold`` gives, if it is of the shapes that it was given."""
    where = f"method {inserted.method.name!r} at {inserted.site.path}"
    try:
        with torch.no_grad():
            made = fold(weight, bias)
            new_weight, new_bias = made
            pairs = ((new_weight, weight), (new_bias, bias))
            fits = all(
                getattr(new, "shape", None) == getattr(old, "shape", None) for new, old in pairs
            )
    except Exception as error:  # whatever the code of a plugin raises
        raise SpliceError(
            f"{where}: its fold fails ({type(error).__name__}: {error}). Nothing has changed. It "
            "gets W (in, out) and b, or None, and returns both; a module whose own bias goes into "
            "b says needs_bias = True."
        ) from error
    if not fits:
        raise SpliceError(
            f"{where}: its fold gives other shapes than the weight and bias that it was given. "
            "Nothing has changed. Return W (in, out) and b as they came, or None for None."
        )
    return new_weight, new_bias


def _reads_bias(inserted: Inserted) -> bool:
    return any(read.endswith(".bias") for read in inserted.edit.reads)
