"""Frozen: parts of the base, and modules registered elsewhere, for use inside an inserted module.

What is assigned to an attribute of an ``nn.Module`` becomes a child of it, and would be moved,
counted, trained and saved with it. These hold a module without owning it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


class Reference:
    """A module that is registered elsewhere, called as if it were here."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class FrozenModule(Reference):
    """A module of the base, such as a norm; no gradient reaches its parameters."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        frozen = {name: p.detach() for name, p in self.module.named_parameters()}
        return functional_call(self.module, frozen, args, kwargs)


class FrozenProjection:
    """``x W + b``, a projection of the base, or the columns of it that belong to one port.

    Shape: (..., in_width) -> (..., width)
    """

    def __init__(
        self, model: nn.Module, weight: str, bias: str, transposed: bool, columns: Any
    ) -> None:
        self._weight = _place(model, weight)
        self._bias = _place(model, bias) if bias else None
        self.transposed, self.columns = transposed, columns

    def tensors(self) -> list[Tensor]:
        """The weight, and the bias if there is one, as the base has them now."""
        places = [self._weight, *filter(None, [self._bias])]
        return [getattr(owner, name) for owner, name in places]

    def reads(self, parameter: Tensor) -> bool:
        """Is this its weight or its bias?"""
        return any(own is parameter for own in self.tensors())

    def matrix(self) -> Tensor:
        """W (in_width, width), as the base has it now."""
        weight: Tensor = getattr(*self._weight).detach()
        return (weight.T if self.transposed else weight)[:, self._chosen()]

    def bias(self) -> Tensor | None:
        """b (width,), or None."""
        return None if self._bias is None else getattr(*self._bias).detach()[self._chosen()]

    def _chosen(self) -> Any:
        return slice(None) if self.columns is None else list(self.columns)

    def __call__(self, x: Tensor) -> Tensor:
        y, bias = x @ self.matrix().to(x.dtype), self.bias()
        return y if bias is None else y + bias.to(x.dtype)


def frozen_inside(module: nn.Module) -> Iterator[FrozenProjection]:
    """The projections of the base that a module and its parts use."""
    return (held for held in _held(module) if isinstance(held, FrozenProjection))


def referred(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that a module and its parts refer to."""
    return (held.module for held in _held(module) if isinstance(held, Reference))


def _held(module: nn.Module) -> Iterator[Any]:
    for part in module.modules():
        for held in vars(part).values():
            yield from held if isinstance(held, (list, tuple)) else [held]


def _place(model: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    path, _, name = parameter.rpartition(".")
    return model.get_submodule(path), name
