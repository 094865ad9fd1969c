"""Use a module of the base, or one registered elsewhere, inside an inserted module.

A module that is assigned to an attribute of an ``nn.Module`` becomes its child, and is moved,
counted, trained and saved with it. The classes here hold a module without owning it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from surgery.interop import updated_weight


class Reference:
    """A module that is registered elsewhere, to be called like a child.

    Example:
        ``norm = surgery.Reference(model.get_submodule("transformer.ln_f"))``, then ``norm(x)``
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class FrozenModule(Reference):
    """A module of the base, such as a norm, whose parameters get no gradient.

    It runs in its own dtype; a tensor that it returns has the dtype of its first input.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        frozen = {name: p.detach() for name, p in self.module.named_parameters()}
        dtype = next((p.dtype for p in frozen.values() if p.is_floating_point()), None)
        x = args[0] if args else None
        if dtype is None or not isinstance(x, Tensor) or x.dtype == dtype:
            return functional_call(self.module, frozen, args, kwargs)
        y = functional_call(self.module, frozen, (x.to(dtype), *args[1:]), kwargs)
        return y.to(x.dtype) if isinstance(y, Tensor) else y


class BaseParameter:
    """A parameter of the base; calling this returns it as the base has it now."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self._place = _place(model, name)

    def __call__(self) -> Tensor:
        found: Tensor = getattr(*self._place)
        return found

    @contextmanager
    def updated(self, left: Tensor, right: Tensor) -> Iterator[None]:
        """Run the code of a ``with`` block as if the parameter were W + L R.

        Products with it become x W + (x L) R, batched as the code batches them, and nothing of the
        size of W is made. While ``torch.compile`` or ``torch.export`` reads the block, the sum
        itself stands in the place of W.

        Args:
            left, right: L (..., p, r) and R (..., r, q), for W (..., p, q).
        """
        if not torch.compiler.is_compiling():
            with updated_weight(self(), left, right):
                yield
            return
        owner, name = self._place
        held = owner._parameters
        weight: Any = held[name]
        held[name] = weight + (left @ right).to(weight.dtype)
        try:
            yield
        finally:
            held[name] = weight


class FrozenProjection:
    """A projection of the base, ``x W + b``, or the columns of it that belong to one port.

    The weight and bias are read from the base at each call; no gradient reaches them.

    Shape: (..., in_width) -> (..., width)
    """

    def __init__(
        self, model: nn.Module, weight: str, bias: str, transposed: bool, columns: Any
    ) -> None:
        self._weight = _place(model, weight)
        self._bias = _place(model, bias) if bias else None
        self.transposed, self.columns = transposed, columns

    def tensors(self) -> list[Tensor]:
        """Return the weight, and the bias if there is one, as the base has them now."""
        places = [self._weight, *filter(None, [self._bias])]
        return [getattr(owner, name) for owner, name in places]

    def reads(self, parameter: Tensor) -> bool:
        """Whether ``parameter`` is the weight or the bias."""
        return any(own is parameter for own in self.tensors())

    def matrix(self) -> Tensor:
        """Return W (in_width, width) as the base has it now."""
        weight = as_matrix(getattr(*self._weight).detach())
        return (weight.T if self.transposed else weight)[:, self._chosen()]

    def bias(self) -> Tensor | None:
        """Return b (width,), or None."""
        return None if self._bias is None else getattr(*self._bias).detach()[self._chosen()]

    def _chosen(self) -> Any:
        return slice(None) if self.columns is None else list(self.columns)

    def __call__(self, x: Tensor) -> Tensor:
        y, bias = x @ self.matrix().to(x.dtype), self.bias()
        return y if bias is None else y + bias.to(x.dtype)


class DistanceScores:
    """What the model adds to the score of a key for its distance from the query.

    The table is read from the base at each call.

    Shape: -> (1, H, n, m), for queries at ``before``, ``before + 1``, ... and keys at 0, 1, ...
    """

    def __init__(self, owner: nn.Module) -> None:
        self._owner = owner

    def __call__(self, n: int, m: int, before: Tensor | int, device: torch.device) -> Tensor:
        own = next(self._owner.parameters()).device
        at = device if own.type == "meta" else own  # an offloaded table comes with its module
        start = before.to(at) if isinstance(before, Tensor) else before
        owner: Any = self._owner
        found: Tensor = owner.compute_bias(n, m, device=at, past_seen_tokens=start)
        return found.to(device)


def as_matrix(weight: Tensor) -> Tensor:
    """Return a weight (out, in, h, w) of a convolution as (out, in h w), and a matrix as it is."""
    return weight.flatten(1) if weight.dim() > 2 else weight


def frozen_inside(module: nn.Module) -> Iterator[FrozenProjection]:
    """Yield the projections of the base that a module and its parts use."""
    return (held for held in _held(module) if isinstance(held, FrozenProjection))


def referred(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that a module and its parts refer to."""
    return (held.module for held in _held(module) if isinstance(held, Reference))


def _held(module: nn.Module) -> Iterator[Any]:
    """Yield the plain attributes of a module and its parts, and the items of lists among them."""
    for part in module.modules():
        for held in vars(part).values():
            yield from held if isinstance(held, (list, tuple)) else [held]


def _place(model: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    """Return the module that holds a parameter, and the name there."""
    path, _, name = parameter.rpartition(".")
    return model.get_submodule(path), name
