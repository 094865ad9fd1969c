"""The rows of a batch in which a splice is on, and what takes them out and puts them back."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from surgery.errors import ForwardError

Made = TypeVar("Made")


@dataclass(frozen=True)
class Rows:
    """The rows of a batch in which a splice is on.

    A batch of k times as many rows has k neighbours for each entry: the beams of a search, several
    returned sequences, the windows of an image.

    Attributes:
        entries: the numbers of the entries of the route.
        of: how many entries the route has.
        factors: the factor of each of ``entries``; empty if all are 1.
    """

    entries: tuple[int, ...]
    of: int
    factors: tuple[float, ...] = ()
    _known: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def whole(self) -> bool:
        """Whether they are all rows, in order."""
        return len(self.entries) == self.of

    def index(self, x: Tensor) -> Tensor:
        """Return the numbers of the rows of x, as a tensor on its device.

        Raises:
            ForwardError: the rows of x are no multiple of the entries.
        """
        each = self.each(x)
        return self.once((each, x.device), x, lambda: self._index(each, x.device))

    def once(self, key: Hashable, x: Tensor, make: Callable[[], Made]) -> Made:
        """Return what ``make`` gives, made once for all calls; ``key`` tells it from others.

        Under a compiler, or for a fake x, it is made anew: a fake tensor is kept nowhere.
        """
        if torch.compiler.is_compiling() or type(x) is not Tensor:
            return make()
        if key not in self._known:
            with torch.inference_mode(False):  # the index outlives this call
                self._known[key] = make()
        made: Made = self._known[key]
        return made

    def each(self, x: Tensor) -> int:
        """Return how many rows of x belong to each entry of the route.

        Raises:
            ForwardError: the rows of x are no multiple of the entries.
        """
        if len(x) % self.of:
            raise ForwardError(
                f"the route has {self.of} entries, and this batch {len(x)} rows. Give the route "
                "one entry for each example; a batch of a multiple, as of beams, is divided evenly."
            )
        return len(x) // self.of

    def _index(self, each: int, device: torch.device) -> Tensor:
        first = torch.tensor(self.entries, dtype=torch.long, device=device) * each
        return (first.unsqueeze(-1) + torch.arange(each, device=device)).flatten()

    def factor(self, part: Tensor) -> Tensor:
        """Return the factors of the rows in ``part``, as a tensor that multiplies it."""
        factors = torch.tensor(self.factors, device=part.device, dtype=part.dtype)
        factors = factors.repeat_interleave(len(part) // len(self.factors))
        return factors.view(-1, *[1] * (part.dim() - 1))


def take_rows(x: Tensor, rows: Rows) -> Tensor:
    """Return the rows of x that a splice has."""
    if not rows.whole:
        return x.index_select(0, rows.index(x))
    rows.each(x)  # raises for another number of rows
    return x


def take_read_rows(x: Tensor, rows: Rows) -> Tensor:
    """Return those of what a module reads; it may have one row for the whole batch, as a mask."""
    return x if len(x) == 1 else take_rows(x, rows)


def put_counted(lse: Tensor, total: Tensor, rows: Rows) -> Tensor:
    """Return the lse in which the rows that a splice has count virtual keys, by their factors."""
    if rows.factors:
        old, share = take_rows(lse, rows), rows.factor(total).expand_as(total)
        inside = (share > 0) & (share < 1)
        part = torch.where(inside, share, 0.5)
        mixed = torch.logaddexp(old + torch.log1p(-part), total + torch.log(part))
        total = torch.where(inside, mixed, torch.where(share > 0, total, old))
    return total if rows.whole else lse.index_copy(0, rows.index(lse), total)


def put_rows(y: Tensor, new: Tensor, rows: Rows) -> Tensor:
    """Return y with ``new`` in the rows that a splice has, scaled by their factors."""
    if rows.factors:
        old = take_rows(y, rows)
        new = old + rows.factor(new) * (new - old)
    return new.to(y.dtype) if rows.whole else y.index_copy(0, rows.index(y), new.to(y.dtype))
