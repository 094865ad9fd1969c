"""List the tensors of inserted modules, by their names in the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from surgery.plugin import Reparametrised
from surgery.splicer import reports


def spliced_parameters(
    model: nn.Module, name: str | None = None
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the inserted parameters of one splice, or of all, with their names in the model.

    A parameter that several inserted modules share comes once, under its first name.

    Args:
        model: a spliced model.
        name: the name of the splice; None means all.
    """
    seen: set[int] = set()
    for report in reports(model).values():
        if name is None or report.name == name:
            for inserted in report.inserted:
                for own, parameter in model.get_submodule(inserted.path).named_parameters():
                    if id(parameter) not in seen:
                        seen.add(id(parameter))
                        yield f"{inserted.path}.{own}", parameter


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that inference needs of the inserted modules, by name.

    They are the ``plain_state`` of a module that has one (``Reparametrised``), else its
    ``state_dict``. A shared tensor comes once.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for report in reports(model).values():
        for inserted in report.inserted:
            module: Any = model.get_submodule(inserted.path)
            state = (
                module.plain_state()
                if isinstance(module, Reparametrised)
                else module.state_dict(keep_vars=True)
            )
            fresh = {n: t for n, t in state.items() if id(t) not in seen}
            seen.update(id(t) for t in fresh.values())
            found |= {f"{inserted.path}.{n}": t for n, t in fresh.items()}
    return found


def full_state(model: nn.Module, names: list[str] | None = None) -> dict[str, Tensor]:
    """Return parameters and persistent buffers of inserted modules, of all splices or of some."""
    found: dict[str, Tensor] = {}
    for name in reports(model) if names is None else names:
        found |= dict(spliced_parameters(model, name)) | dict(_buffers(model, name))
    return found


def _buffers(model: nn.Module, name: str) -> list[tuple[str, Tensor]]:
    """Return the persistent buffers of one splice; they are those in the ``state_dict``."""
    found = []
    for inserted in reports(model)[name].inserted:
        module = model.get_submodule(inserted.path)
        named = dict(module.named_buffers())
        found += [(f"{inserted.path}.{n}", named[n]) for n in module.state_dict() if n in named]
    return found
