"""The modules that are inserted at a port for a module, a function or a tensor of the user's.

    Changing     y := what(y), or what(*reads)       inside a graph
    Reading      what(y); y stays                    inside a graph
    Around       the same two for ``call``           around a whole module

A module of the user's runs in every forward. A function or a tensor sits out the forwards in which
the library tries something with an example: it may fit the user's inputs alone, and must not note
values that the user has not asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from surgery.errors import ForwardError
from surgery.interop import described, in_backward, on_trial


class AtPort(nn.Module):
    """What all of them share.

    Attributes:
        what: a module, or a function.
        where: the verb, the port and the site, for errors.
        tried: whether ``what`` runs in trials, too; if not, the port keeps its value there.
    """

    def __init__(self, what: Callable[..., Any], where: str, tried: bool) -> None:
        super().__init__()
        self.what, self.where, self.tried = what, where, tried

    @property
    def awake(self) -> bool:
        """Whether ``what`` runs in this forward."""
        return self.tried or not on_trial()


class Changing(AtPort):
    """Return ``what(*reads)``, or ``what(y)`` without any, in the shape and dtype of y.

    Args:
        heads: whether it reads heads; its output is then (B, n, H d), whatever the port has.
    """

    def __init__(
        self, what: Callable[..., Any], where: str, tried: bool, heads: bool = False
    ) -> None:
        super().__init__(what, where, tried)
        self.heads = heads

    def forward(self, y: Tensor, *reads: Any) -> Tensor:
        if not self.awake:
            return y
        return fitted(self.what(*(reads or (y,))), y, self.where, self.heads)


class Reading(AtPort):
    """Return y as it is, and call ``what`` with y, or with what is read in place of it.

    A forward that gradient checkpointing repeats is not read again.
    """

    def forward(self, y: Tensor, *reads: Any) -> Tensor:
        if self.awake and not in_backward():
            self.what(*(reads or (y,)))
        return y


class Around(AtPort):
    """Call a whole module, and let an :class:`AtPort` have the hidden states that it returns.

    They are the output itself, or the first of several. Where ``whole`` is given, it runs in place
    of the module, with the same arguments.
    """

    def __init__(self, inner: AtPort, whole: bool = False) -> None:
        super().__init__(inner, inner.where, inner.tried)
        self.whole = whole

    def forward(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        inner: Any = self.what
        if self.whole:
            return inner.what(*args, **kwargs) if inner.awake else run(*args, **kwargs)
        out = run(*args, **kwargs)
        if isinstance(out, Tensor):
            return inner(out)
        first = next(iter(out)) if isinstance(out, dict) else 0
        if not isinstance(out, (tuple, list, dict)) or not isinstance(out[first], Tensor):
            raise ForwardError(
                f"{self.where}: the module returns a {type(out).__name__} that does not start with "
                "a tensor, so it has no hidden states to edit. Edit the 'output' of a site in it."
            )
        if isinstance(out, dict):
            made: Any = copy.copy(out)
            made[first] = inner(out[first])
            return made
        values = [inner(out[0]), *out[1:]]
        return type(out)(*values) if hasattr(out, "_fields") else type(out)(values)


class Constant(nn.Module):
    """Return a tensor in the shape of y, whatever y is.

    Shape: value, anything that broadcasts to y; (...) -> the shape of y
    """

    value: Tensor

    def __init__(self, value: Tensor, where: str) -> None:
        super().__init__()
        self.where = where
        if isinstance(value, nn.Parameter):
            self.value = value
        else:
            self.register_buffer("value", value)

    def forward(self, y: Tensor) -> Tensor:
        try:
            return self.value.to(y).expand_as(y)
        except RuntimeError:
            raise ForwardError(
                f"{self.where}: the tensor has the shape {tuple(self.value.shape)}, and the port "
                f"{tuple(y.shape)} in this forward. Give a tensor that broadcasts to it, or a "
                "function that changes a part of the port."
            ) from None


def fitted(made: Any, y: Tensor, where: str, heads: bool) -> Tensor:
    """Return what was made in the dtype of y.

    Raises:
        ForwardError: it is no tensor of the shape of y.
    """
    fits = isinstance(made, Tensor) and (heads or made.shape == y.shape)
    if fits and made.numel() == y.numel():
        made_of_it: Tensor = made.to(y)
        return made_of_it
    got = f"the shape {tuple(made.shape)}" if isinstance(made, Tensor) else described(made)
    hint = " An edit in place needs a return, too." if made is None else ""
    raise ForwardError(
        f"{where}: what was inserted returns {got}, where the port has the shape "
        f"{tuple(y.shape)}. Return a tensor of that shape.{hint}"
    )
