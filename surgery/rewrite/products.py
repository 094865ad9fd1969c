"""Compute the low-rank products of inserted modules in few operators, forward and backward.

    H = x (A_1 ... A_k)^T                one product for all modules that read x
    y_i + s_i h_i B_i                    one operator for each, h_i its columns of H

    backward    dx = dH A, dA = dH^T x           two products for all modules
                dh_i = s_i dy B_i^T, dB_i = s_i h_i^T dy

The factors A lie side by side in one piece of memory (side_by_side.py), so the stack of
them is a view, and always holds what they hold. Where they do not, they are copied into one.

The scale is a factor of the products themselves (``addmm``), which autograd alone would multiply
in steps of their own. Inside ``torch.func``, forward-mode differentiation, ``torch.compile`` and
tracing, which see no further than torch's operators, torch's own gradients are used.

Under ``torch.compile`` each module has a product of its own, and in training the scale multiplies
h. To concatenate factors, and to scale the gradients of ``addmm``, needs kernels that a compiler
spends seconds on, and they save no time later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.rewrite.side_by_side import KeptStack, only_plain_operators, side_by_side


def add_product(onto: Tensor | None, hidden: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Return ``onto + scale * hidden @ b`` in one operator, or ``scale * hidden @ b`` without onto.

    Args:
        onto: (..., d_out); the result has its dtype. None means that there is nothing to add to.
        hidden: (..., r).
        b: (r, d_out).

    Gradients are those of the formula; the scale costs no operator in them either. For modules that
    end in a low-rank product, see ``surgery.StartsWithProduct``.

    Example:
        ``surgery.add_product(y, F.linear(x, self.a), self.b, self.scale)``
    """
    if _autocast(hidden):
        with torch.autocast(hidden.device.type, enabled=False):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            return add_product(onto, hidden.to(dtype), b.to(dtype), scale)
    if onto is not None and onto.dtype != hidden.dtype:
        return onto + add_product(None, hidden, b, scale).to(onto.dtype)
    if torch.is_grad_enabled() and not only_plain_operators():
        made: Tensor = _AddProduct.apply(onto, hidden, b, scale)  # type: ignore[no-untyped-call]
        return made
    return _added(onto, hidden, b, scale)


def first_products(
    x: Tensor, factors: Sequence[Tensor | None], stack: KeptStack | None = None
) -> tuple[list[Tensor | None], Tensor]:
    """Return ``x @ a.T`` for each factor a (r, d_in), by one product, and x for later readers.

    A factor may be None, and its product is None then. What reads the returned x, in place of the
    given one, sends its gradient into the product for dx, and no operator adds the two.

    Args:
        stack: keeps the stack of the factors from call to call.
    """
    stack = stack or KeptStack()
    different = list({id(a): a for a in factors if a is not None}.values())
    if not different:
        return [None] * len(factors), x
    if _autocast(x):
        given = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            parts, x = _products(x, given, different, stack)
    else:
        parts, x = _products(x, x, different, stack)
    if len(different) == len(factors):
        return [*parts], x
    found = {id(a): part for a, part in zip(different, parts, strict=True)}
    return [None if a is None else found[id(a)] for a in factors], x


def _products(
    x: Tensor, given: Tensor, factors: Sequence[Tensor], stack: KeptStack
) -> tuple[Sequence[Tensor], Tensor]:
    """Return the products of ``given``, which is ``x`` in the dtype of a product, and x."""
    if torch.compiler.is_compiling():
        return [F.linear(given, a.to(given.dtype)) for a in factors], x
    plain = only_plain_operators()
    if plain or not torch.is_grad_enabled():
        whole = side_by_side(factors, 0) if plain else stack.of(factors)
        hidden = F.linear(given, whole if whole.dtype is given.dtype else whole.to(given.dtype))
    elif given is x and x.requires_grad:
        hidden, x = _ProductAndInput.apply(x, *factors)  # type: ignore[no-untyped-call]
    else:
        hidden = _Product.apply(given, *factors)  # type: ignore[no-untyped-call]
    if len(factors) == 1:
        return [hidden], x
    return hidden.split_with_sizes([len(a) for a in factors], -1), x


def split_columns(y: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Return ``y.split(sizes, -1)``; its gradient is a view where those of the parts are views."""
    if torch.is_grad_enabled() and not only_plain_operators():
        return _Split.apply(y, tuple(sizes))  # type: ignore[no-untyped-call,no-any-return]
    return torch.split(y, list(sizes), -1)


def _added(onto: Tensor | None, hidden: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return ``onto + scale * hidden @ b``, whose scale is a part of the product."""
    rank, width = b.shape
    rows = hidden.reshape(-1, rank)
    if scale != 1 and torch.is_grad_enabled() and torch.compiler.is_compiling():
        rows, scale = scale * rows, 1.0
    if onto is not None:
        return torch.addmm(onto.reshape(-1, width), rows, b, alpha=scale).view_as(onto)
    return _scaled_product(rows, b, scale).view(*hidden.shape[:-1], width)


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return ``scale * left @ right`` of two matrices."""
    if scale == 1:
        return left @ right
    ignored = left.new_empty(())
    return torch.addmm(ignored, left, right, beta=0, alpha=scale)


def _autocast(x: Tensor) -> bool:
    """Whether autocast multiplies ``x`` in another dtype."""
    if not torch._C._is_any_autocast_enabled() or x.is_meta or x.dtype == torch.float64:
        return False
    return torch.is_autocast_enabled(x.device.type)


class _Product(torch.autograd.Function):
    """x (..., d_in) and factors (r_i, d_in) -> (..., sum r_i)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(x, *factors)
        return F.linear(x, side_by_side(factors, 0).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _product_gradients(ctx, grad, None)


class _ProductAndInput(torch.autograd.Function):
    """x (..., d_in) and factors (r_i, d_in) -> (..., sum r_i), and x itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *factors: Tensor) -> tuple[Tensor, Tensor]:
        return _Product.forward(ctx, x, *factors), x

    @staticmethod
    def backward(ctx: Any, grad: Tensor, passed: Tensor) -> tuple[Tensor | None, ...]:
        return _product_gradients(ctx, grad, passed)


def _product_gradients(ctx: Any, grad: Tensor, passed: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, that of its later readers included, and of the factors."""
    x, *factors = ctx.saved_tensors
    rows = grad.reshape(-1, grad.shape[-1])
    dx: Tensor | None = None
    da: Sequence[Tensor | None] = [None] * len(factors)
    if ctx.needs_input_grad[0]:
        stack = torch.cat(factors) if torch.is_grad_enabled() else side_by_side(factors, 0)
        dx = _added(passed, grad, stack.to(grad.dtype), 1.0)
    if any(ctx.needs_input_grad[1:]):
        whole = rows.T @ x.reshape(-1, x.shape[-1])
        da = torch.split(whole.to(factors[0].dtype), [a.shape[0] for a in factors])
    return dx, *da


class _AddProduct(torch.autograd.Function):
    """onto (..., d_out), hidden (..., r), b (r, d_out) -> onto + scale hidden b."""

    @staticmethod
    def forward(ctx: Any, onto: Tensor | None, hidden: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(hidden, b)
        ctx.scale = scale
        return _added(onto, hidden, b, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, b = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        dh = db = None
        if ctx.needs_input_grad[1]:
            dh = _scaled_product(rows, b.T, ctx.scale).view(hidden.shape)
        if ctx.needs_input_grad[2]:
            db = _scaled_product(hidden.reshape(-1, hidden.shape[-1]).T, rows, ctx.scale)
        return grad if ctx.needs_input_grad[0] else None, dh, db, None


class _Split(torch.autograd.Function):
    """y (..., sum of sizes) -> its columns, as views; the gradient is a view where it can be."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        return torch.split(y, list(sizes), -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            return torch.cat(grads, -1), None
        return side_by_side(grads, -1), None
