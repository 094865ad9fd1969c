"""Run code as if a weight were W + L R, without making that sum where only products are wanted.

    with updated_weight(W, L, R):     W (..., p, q), L (..., p, r), R (..., r, q)
        x @ W[e]                      x @ W[e] + (x @ L[e]) @ R[e]
        F.linear(x, W[e])             F.linear(x, W[e]) + (x @ R[e].mT) @ L[e].mT
        grouped_mm(x, W, offs=ends)   the same, each of the three products grouped by expert
        anything else                 is given W + L R

A module of experts owns the weights of all of them, (experts, in, out), and multiplies them in one
of several ways: in a loop over experts, gathered for each token, or grouped. Inside the block each
torch function that is called with W is given an :class:`UpdatedWeight` in its place; look-ups and
transpositions of it are taken of W, L and R, until a product is reached. The block holds for its
thread alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_PRODUCTS = ("matmul", "mm", "bmm")
_GROUPED = ("grouped_mm", "grouped_mm_fallback")
_TRANSPOSES = ("transpose", "swapaxes", "swapdims", "mT", "T", "t", "adjoint", "permute")
_CASTS = ("to", "type_as", "contiguous", "float", "half", "bfloat16", "double")
_ASKS = ("shape", "dtype", "device", "dim", "ndim", "size", "stride", "len", "numel", "data_ptr",
         "requires_grad", "is_floating_point", "is_contiguous", "is_cuda", "is_meta")  # fmt: skip

Pair = tuple[Tensor, Tensor]


class UpdatedWeight(Tensor):
    """The weight W + L R: the tensor W, with products and look-ups that count L R."""

    plain: Tensor  # W
    pairs: tuple[Pair, ...]  # (L, R) of each block, added one by one: one of zeros moves no bit
    counted: tuple[updated_weight, ...]  # the blocks that have added to it

    @staticmethod
    def of(
        weight: Tensor, pairs: Iterable[Pair], counted: tuple[updated_weight, ...]
    ) -> UpdatedWeight:
        """Return W + L R, with an L R of each pair."""
        made = weight.as_subclass(UpdatedWeight)
        made.plain, made.pairs, made.counted = weight, tuple(pairs), counted
        return made

    def whole(self) -> Tensor:
        """Return W + L R as one tensor."""
        made = self.plain
        for left, right in self.pairs:
            made = made + (left @ right).to(made.dtype)
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.strip("_")
        if name == "get":  # the getter of an attribute, such as W.mT
            name = func.__self__.__name__
        updated = [isinstance(a, cls) for a in (*args, *kwargs.values())]
        if sum(updated) == 1:
            if updated[0]:
                found = args[0]._looked_up(name, func, args[1:], kwargs)
                if found is not None:
                    return found
            front = updated[0] and name in _PRODUCTS and len(args) == 2
            behind = len(args) > 1 and updated[1] and name in ("linear", *_PRODUCTS, *_GROUPED)
            if front or behind:
                return args[0 if front else 1]._product(name, func, args, kwargs)
        plain = [a.whole() if isinstance(a, cls) else a for a in args]
        return func(
            *plain, **{k: v.whole() if isinstance(v, cls) else v for k, v in kwargs.items()}
        )

    def _looked_up(self, name: str, func: Any, rest: tuple[Any, ...], kwargs: Any) -> Any:
        """Return what is asked of W, a part of the experts, or the transpose; else None."""
        weight, pairs = self.plain, self.pairs
        make = functools.partial(UpdatedWeight.of, counted=self.counted)
        if name in _ASKS:
            return func(weight, *rest, **kwargs)
        if name in _CASTS:
            return make(func(weight, *rest, **kwargs), pairs)
        if name in _TRANSPOSES:
            turned = func(weight, *rest, **kwargs)
            like = weight.mT
            if turned.shape == like.shape and turned.stride() == like.stride():
                return make(turned, [(right.mT, left.mT) for left, right in pairs])
        if weight.dim() < 3:
            return None
        if name == "unbind" and not any((*rest, *kwargs.values())):
            each = [zip(left.unbind(), right.unbind(), strict=True) for left, right in pairs]
            return tuple(map(make, weight.unbind(), zip(*each, strict=True)))
        of_first = (rest[0] if rest else kwargs.get("dim")) == 0
        plain = name == "getitem" and isinstance(rest[0], (int, slice, Tensor))
        if plain or (name in ("select", "index_select") and of_first):
            chosen = [tuple(func(x, *rest, **kwargs) for x in pair) for pair in pairs]
            return make(func(weight, *rest, **kwargs), chosen)
        return None

    def _product(self, name: str, func: Any, args: tuple[Any, ...], kwargs: Any) -> Tensor:
        """Return a product with W plus those with each L R, in the dtype of the first."""
        weight, front, rest = self.plain, args[0] is self, args[2:]
        x = args[1] if front else args[0]
        y: Tensor = func(*((weight, x) if front else (x, weight)), *rest, **kwargs)
        casts = not torch.is_autocast_enabled(x.device.type)
        for left, right in self.pairs:
            given = x.to(left.dtype) if casts else x
            if name in _GROUPED:
                left, right = _aligned(left, right)
            more: Tensor
            if front:
                more = func(left, func(right, given))
            elif name == "linear":  # W is (out, in)
                more = F.linear(F.linear(given, right), left)
            else:
                more = func(func(given, left, *rest, **kwargs), right, *rest, **kwargs)
            y = y + more.to(y.dtype)
        return y


def _aligned(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return L and R with the rank filled up with zeros: grouped_mm takes rows of 16 bytes."""
    missing = -right.shape[-2] % (16 // right.element_size())
    if not missing:
        return left, right
    return F.pad(left.mT, (0, 0, 0, missing)).mT, F.pad(right, (0, 0, 0, missing))


class updated_weight(TorchFunctionMode):
    """Run the code in a ``with`` block as if ``weight`` were W + L R; see the top of the file.

    Args:
        weight: W, the very tensor that the code uses.
        left, right: L and R. In another dtype than W, products with them are computed in theirs.
    """

    def __init__(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.weight, self.left, self.right = weight, left, right

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = {k: self._updated(v) for k, v in (kwargs or {}).items()}
        return func(*map(self._updated, args), **named)

    def _updated(self, a: Any) -> Any:
        """Return W as an updated weight, also one that another block has updated; else ``a``."""
        own = (self.left, self.right)
        if a is self.weight:
            return UpdatedWeight.of(self.weight, (own,), (self,))
        if isinstance(a, UpdatedWeight) and a.plain is self.weight and self not in a.counted:
            return UpdatedWeight.of(self.weight, (*a.pairs, own), (*a.counted, self))
        return a
