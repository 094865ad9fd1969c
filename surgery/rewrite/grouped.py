"""Run several inserted modules of one class at once, each for rows of the batch of its own.

    y[rows of m] := y[rows of m] + update_m(x[rows of m])        for every module m of the group

The modules stand at one port and come from several splices. The node asks at each call which rows
have which of them, so one graph serves every route, and a module that offers ``forward_grouped``
runs for all rows in as many operators as one alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.rewrite.casts import as_taken, dtype_of
from surgery.rewrite.nodes import added, has_hooks
from surgery.rewrite.rows import Rows


@dataclass(frozen=True)
class Picks(Rows):
    """Rows of a batch, each of which has one splice of a group.

    Attributes:
        names: the splice of each of ``entries``.
    """

    names: tuple[str, ...] = ()

    def parts(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return how the rows that are taken divide among the splices, and come back in order.

        Returns:
            The numbers of the rows in x of each different splice, in the order of their first
            entries; and the order in which these rows, one part after the other, are x's again.
        """
        each = len(x) // len(self.names)
        return self.once(("parts", each, x.device), x, lambda: self._parts(each, x.device))

    def _parts(self, each: int, device: torch.device) -> tuple[list[Tensor], Tensor]:
        numbers = torch.arange(each * len(self.names), device=device).view(-1, each)
        parts = [
            numbers[[i for i, other in enumerate(self.names) if other == name]].flatten()
            for name in dict.fromkeys(self.names)
        ]
        return parts, torch.cat(parts).argsort()


class Grouped:
    """Modules that act as one: the i-th runs for the i-th of as many equal parts of the rows.

    Attributes:
        modules: one for each entry of a route; one alone if there is no entry, for no rows.
        different: the same, each once.
        picks: which rows have which of them.
    """

    def __init__(self, modules: Sequence[nn.Module], picks: Picks) -> None:
        self.modules, self.picks = modules, picks
        self.different = list(dict.fromkeys(modules))

    def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        several = len(self.different)
        # Few modules with many rows each: stacking a copy for each row would cost more.
        if several > 1 and 4 * several > len(self.modules) and self._alike():
            given = {} if onto is None else {"onto": onto}
            kind: Any = type(self.modules[0])
            made: Tensor | None = kind.forward_grouped(
                self.modules, as_taken(self.modules[0], x), **given
            )
            if made is not None:
                return made if onto is not None else made.to(x.dtype)
        if several == 1:
            return _run(self.modules[0], x, onto)
        return self._one_by_one(x, onto)

    def _alike(self) -> bool:
        """Whether all are of one class, dtype and mode, without hooks or forwards of their own."""
        first = self.modules[0]
        dtype = dtype_of(first)
        return all(
            type(m) is type(first)
            and m.training == first.training
            and dtype_of(m) == dtype
            and not has_hooks(m)
            and not (m._backward_hooks or m._backward_pre_hooks or "forward" in vars(m))
            for m in self.different
        )

    def _one_by_one(self, x: Tensor, onto: Tensor | None) -> Tensor:
        """Run each module for all of its rows, and put the rows back in their order."""
        parts, order = self.picks.parts(x)
        made = [
            _run(
                module,
                x.index_select(0, rows),
                onto if onto is None else onto.index_select(0, rows),
            )
            for module, rows in zip(self.different, parts, strict=True)
        ]
        return torch.cat(made).index_select(0, order)


def _run(module: nn.Module, x: Tensor, onto: Tensor | None) -> Tensor:
    taken = as_taken(module, x)
    if onto is None:
        made: Tensor = module(taken)
        return made.to(x.dtype)
    return added(module, onto, taken)


def grouped(host: Any, picks: Picks, children: Mapping[str, str]) -> Grouped:
    """Return the modules of a host that these picks name; ``children`` are theirs by splice."""
    names = picks.names or tuple(children)[:1]
    return Grouped([getattr(host, children[name]) for name in names], picks)
