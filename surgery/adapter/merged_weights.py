"""Plan a merge: the new weights of the base, and the modules that they make superfluous.

    y = x W + b        the projection that makes a port; W (in, out), only the port's columns

    for each port with inserted modules
      why_not             refuse a module that is not linear, a weight that is used elsewhere too,
                          and a module behind one that stays
      fold_into_weights   fold the feeds, the last (nearest to the projection) first; then the
                          modules behind the projection, in order
    conflicts             modules that must stay because of others that stay

The protocols ``Foldable``, ``FoldableInput``, ``PartlyFoldable`` and ``NeedsBias`` of
surgery/plugin/module_protocols.py say what a module offers for this. All folds into one weight go
into one float64 copy, so that rounding happens once. A module that reads the projection's bias is
given what b holds besides that bias. Nothing is changed here: adapter/merging.py does that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from surgery.adapter.constants import why_no_constant
from surgery.adapter.folding import call_fold, protocol_of, reads_bias
from surgery.errors import SpliceError
from surgery.interop import stored_parameters
from surgery.plugin import (
    NeedsBias,
    PartlyFoldable,
    Port,
    Site,
    as_matrix,
    frozen_inside,
    referred,
)
from surgery.splicer import Inserted, look_up, reports


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two parameters are one, or tied by memory, as by ``load_state_dict(assign=True)``."""
    return a is b or (a.data_ptr() == b.data_ptr() != 0 and a.numel() > 0)


class MergePlan:
    """The new weights, and the modules that they make superfluous.

    Attributes:
        weights: float64 values for parameters of the base, by name.
        whole: modules that can go.
        parts: modules of which a part is folded (``PartlyFoldable``) and the rest stays.
        left: modules that stay although they were chosen.
        untied: names of weights that are tied to another and need a copy of their own.

    Args:
        names: the splices to merge.
        partial: leave in place what cannot be folded, instead of raising.
        stay: paths of modules that are not to be folded, and why.
        untie: fold into a tied weight, too, which then needs a copy of its own.
        plain: paths of linear layers that stand in the place of quantised ones.
    """

    def __init__(
        self,
        model: nn.Module,
        names: list[str],
        partial: bool,
        stay: dict[str, str],
        untie: bool = False,
        plain: Collection[str] = (),
    ) -> None:
        self.model, self.partial, self.stay, self.untie = model, partial, stay, untie
        self.plain = plain
        self.parameters = stored_parameters(model)
        self.untied: list[str] = []
        self.weights: dict[str, Tensor] = {}
        self.whole: list[Inserted] = []
        self.parts: list[Inserted] = []
        self.left: list[Inserted] = []
        ports: dict[tuple[Any, str], list[tuple[Inserted, bool]]] = {}
        self.every = [(i, r.name in names) for r in reports(model).values() for i in r.inserted]
        for i, is_chosen in self.every:
            ports.setdefault((i.site.identity, i.edit.port), []).append((i, is_chosen))
        self.refused: set[str] = set()
        last = [entries for entries in ports.values() if entries[0][0].site.kind == "block"]
        for entries in [each for each in ports.values() if each not in last] + last:
            self.plan_port(entries)

    def plan_port(self, entries: list[tuple[Inserted, bool]]) -> None:
        """Fold the chosen modules at one port, or refuse them.

        Args:
            entries: all modules at the port, in order; True with those that were chosen.

        Raises:
            SpliceError: a chosen module cannot be folded, and ``partial`` is False.
        """
        why: dict[str, str] = {}
        for _ in range(len(entries) + 1):  # a refused module stays and may be in another's way
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
            self.fold_into_weights(chosen)

    def conflicts(self) -> dict[str, str]:
        """Return the modules that cannot go because of others that stay: reasons by path.

        A module that stays may use a part of another, or compute with a weight as it is now. What
        is off will be switched on over the merged weights.
        """
        gone, choice = {i.path for i in self.whole}, look_up(self.model).switches.default
        every = [(i, report.name) for report in reports(self.model).values()
                 for i in report.inserted]  # fmt: skip
        staying = [(i, self.model.get_submodule(i.path), choice.has(name))
                   for i, name in every if i.path not in gone]  # fmt: skip
        found: dict[str, str] = {}
        for i in [*self.whole, *self.parts]:
            inside = set(self.model.get_submodule(i.path).modules())
            port = self.port_of(i)
            for other, module, is_on in staying:
                if i.path in gone and not inside.isdisjoint(referred(module)):
                    found[i.path] = f"{other.method.name!r} at {other.site.path} uses parts of it"
                for name in [n for n in (port.weight, port.bias) if is_on and n in self.parameters]:
                    if any(frozen.reads(self.parameters[name]) for frozen in frozen_inside(module)):
                        found[i.path] = f"{other.method.name!r} computes with the base's {name}"
        return {path: why for path, why in found.items() if path not in self.stay}

    def fold_into_weights(self, chosen: list[Inserted]) -> None:
        """Fold these modules of one port into the copies of its projection's weight and bias.

        Raises:
            SpliceError: a ``fold`` fails, or a value is not finite in the dtype of the base.
        """
        port = self.port_of(chosen[0])
        weight, bias = self.float64_copy(port.weight), self.float64_copy(port.bias)
        at: Any = slice(None) if port.columns is None else torch.tensor(port.columns)
        matrix = weight if weight is None or port.stacked else as_matrix(weight)
        matrix = matrix.mT if port.transposed and matrix is not None else matrix
        w = matrix[..., at] if matrix is not None else None
        b = bias[at] if bias is not None else None
        own_bias = None if b is None else b.clone()  # the projection's bias before any fold
        feeds = [i for i in chosen if i.edit.verb == "feed"]
        behind = [i for i in chosen if i.edit.verb != "feed"]
        for inserted in [*reversed(feeds), *behind]:
            module: Any = self.model.get_submodule(inserted.path)
            if inserted.edit.verb == "feed":
                w = call_fold(inserted, module, lambda w, b, m=module: (m.fold_input(w), b), w, b)[
                    0
                ]
            elif b is not None and own_bias is not None and reads_bias(inserted):
                w, b = call_fold(inserted, module, module.fold, w, b - own_bias)
                b = None if b is None else own_bias + b
            else:
                w, b = call_fold(inserted, module, module.fold, w, b)
            (self.parts if isinstance(module, PartlyFoldable) else self.whole).append(inserted)
        for name, merged in ((port.weight, w), (port.bias, b)):
            if merged is not None and not bool(
                merged.to(self.parameters[name].dtype).isfinite().all()
            ):
                raise SpliceError(
                    f"{name} would have values after the merge that are not finite in "
                    f"{self.parameters[name].dtype}. Nothing has changed; merge a copy in a wider "
                    "dtype."
                )
        if matrix is not None:
            assert w is not None
            matrix[..., at] = w  # a view: it writes to ``weight``
        if bias is not None:
            assert b is not None
            bias[at] = b

    def port_of(self, inserted: Inserted) -> Port:
        """Return the port of a module, with the matrix of a layer that has been dequantised."""
        port = inserted.site.port(inserted.edit.port)
        if port.weight or port.module not in self.plain:
            return port
        bias = f"{port.module}.bias"
        return dataclasses.replace(
            port,
            weight=f"{port.module}.weight",
            bias=bias if bias in self.parameters else "",
            transposed=True,
        )

    def float64_copy(self, name: str) -> Tensor | None:
        """Return the copy of a parameter that all folds write to; None if ``name`` is empty."""
        if not name:
            return None
        if name not in self.weights:
            copy = self.parameters[name].detach().double()
            self.weights[name] = copy.clone(memory_format=torch.contiguous_format)
        return self.weights[name]

    def why_not(self, inserted: Inserted, entries: list[tuple[Inserted, bool]]) -> str:
        """Return why a module cannot be folded; '' if it can."""
        if inserted.path in self.stay:
            return self.stay[inserted.path]
        module, edit = self.model.get_submodule(inserted.path), inserted.edit
        port = self.port_of(inserted)
        if not isinstance(module, protocol_of(edit)):
            what = "fold_input(weight)" if edit.verb == "feed" else "fold(weight, bias)"
            return (
                f"its module {type(module).__name__} has no {what}, so as far as is known it is "
                "not a linear map of the projection's input"
            )
        if isinstance(module, PartlyFoldable) and not self.partial:
            return "only a part of its module is linear"
        if inserted.site.kind == "block":
            why = why_no_constant(inserted, module, port) or self.why_between(inserted, port)
            if why:
                return why
        elif not port.weight and not (inserted.site.kind == "norm" and port.bias):
            hint = "; if it is quantised, merge(..., dequantize=True) makes it one"
            return (
                f"port {port.name!r} is not made by one plain floating-point matrix"
                f"{hint if port.module else ''}"
            )
        for name in (port.weight, port.bias):
            if name and name not in self.parameters:
                return f"{name} is no longer a parameter (a parametrization may compute it)"
        if isinstance(module, NeedsBias) and module.needs_bias and not port.bias:
            return f"the projection of port {port.name!r} has no bias to fold the module's into"
        return self.why_shared(inserted.site, port) or self.why_blocked(inserted, entries)

    def why_shared(self, site: Site, port: Port) -> str:
        """Return where else the weight or bias of a port is used; '' if nowhere."""
        for name in filter(None, (port.weight, port.bias)):
            tied = self.parameters.items()
            others = [n for n, p in tied if _share_memory(p, self.parameters[name]) and n != name]
            if others and not self.untie:
                return (
                    f"its weight {name} is also {others[0]}, which must stay as it is "
                    "(untie=True gives it a copy of its own)"
                )
            if others and name not in self.untied:
                self.untied.append(name)
        if port.shared:
            return f"another site runs its weight {port.weight}, too, and would get this update"
        for other in site.ports.values():
            overlap = other.columns is None or not {*other.columns}.isdisjoint(port.columns or ())
            if other.name != port.name and port.weight and other.weight == port.weight and overlap:
                return f"its weight {port.weight} also makes port {other.name!r}"
        return ""

    def why_between(self, inserted: Inserted, port: Port) -> str:
        """Return what stays at the port whose bias a block adds last; '' if nothing does."""
        for other, is_chosen in self.every:
            ports = other.site.ports.values() if other.site.kind != "block" else ()
            names = {each.name for each in ports if each.bias == port.bias}
            near = names & {other.edit.port, *(read.split(".")[0] for read in other.edit.reads)}
            if near and not (is_chosen and self.folds_whole(other)):
                return (
                    f"{other.method.name!r} at {other.site.path} stays, and works with port "
                    f"{near.pop()!r}, whose bias would hold the constant"
                )
        return ""

    def why_blocked(self, inserted: Inserted, entries: list[tuple[Inserted, bool]]) -> str:
        """Return what stays between the projection and this module; '' if nothing does.

        Modules that only add to the port commute, so one that stays blocks no other.
        """
        place = next(n for n, (i, _) in enumerate(entries) if i is inserted)
        port = inserted.edit.port
        for number, (other, chosen) in enumerate(entries):
            if number == place or (chosen and self.folds_whole(other)):
                continue
            reads = other.edit.reads
            behind = inserted.edit.verb != "feed"  # only feeds stand in front of the projection
            sums = other.edit.verb == inserted.edit.verb == "add" and port not in reads
            if other.edit.verb == "feed" or (behind and number < place and not sums):
                return f"{other.method.name!r} stands before it and stays"
            if behind and f"{port}.bias" in reads:
                return f"{other.method.name!r} reads the bias of {port!r} and stays"
        return ""

    def folds_whole(self, inserted: Inserted) -> bool:
        """Whether nothing is left of a module after the fold."""
        if inserted.path in self.refused:
            return False
        module = self.model.get_submodule(inserted.path)
        return isinstance(module, protocol_of(inserted.edit)) and not isinstance(
            module, PartlyFoldable
        )
