"""Hold an adapter of another library as it was read, and what it becomes here.

    files, or an object in hand -> Foreign -> Translation -> the pipeline of surgery.load

Nothing in a ``Foreign`` has been compared with a model. A ``Translation`` says which methods are to
be spliced where, and what their tensors will hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from surgery.errors import StoreError, shown
from surgery.plugin import Edit, Method, Sites

LONGEST = 1000  # characters of a name


@dataclass(frozen=True)
class Foreign:
    """An adapter of another library.

    Attributes:
        where: its folder, for messages.
        config: what its adapter_config.json holds.
        tensors: its tensors, by their names in the file.
    """

    where: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def refuse(self, why: str) -> StoreError:
        """Return the error that this adapter cannot be loaded."""
        return StoreError(f"the adapter in {self.where} cannot be loaded here: {why}")


@dataclass(frozen=True)
class Translation:
    """What an adapter of another library becomes here.

    Attributes:
        methods: the methods to splice.
        sites: where.
        value: returns the tensor for a parameter of the module that an edit inserts at the site of
            a path; None if there is none.
        kept: tensors of the base that the adapter brings, by name.
        rows: single rows of parameters of the base that it brings, with their numbers.
    """

    methods: list[Method]
    sites: Sites
    value: Callable[[str, Edit, str], Tensor | None]
    kept: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)


def require_shape(adapter: Foreign, key: str, wanted: tuple[int, ...], why: str) -> Tensor:
    """Return a tensor of the adapter.

    Raises:
        StoreError: it is missing, or has another shape; the message says ``why`` that one is right.
    """
    found = adapter.tensors.get(key)
    if found is None:
        raise adapter.refuse(f"it lacks the tensor {key} of shape {wanted}: {why}.")
    if tuple(found.shape) != wanted:
        raise adapter.refuse(f"{key} has the shape {tuple(found.shape)}, not {wanted}: {why}.")
    return found


def option(adapter: Foreign, name: str, default: Any, *kinds: type) -> Any:
    """Return an entry of the config, ``default`` if it is missing or None.

    Raises:
        StoreError: it has another type than these; True and False are no numbers.
    """
    value = adapter.config.get(name)
    if value is None:
        return default
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise adapter.refuse(f"its config has {name}={shown(value)}, where {wanted} must stand.")
    return value
