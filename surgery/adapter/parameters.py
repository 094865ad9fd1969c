"""List the tensors of inserted modules and of the base, by their names in the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from surgery.plugin import Reparametrised
from surgery.splicer import in_use, look_up, reports, spliced_model


def spliced_parameters(
    model: nn.Module, name: str | None = None
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the inserted parameters of one splice, or of all, with their names in the model.

    A parameter that several inserted modules share comes once, under its first name.

    Args:
        model: a spliced model.
        name: the name of the splice; None means all.

    Example:
        ``sum(p.numel() for _, p in surgery.spliced_parameters(model))``
    """
    seen: set[int] = set()
    model = spliced_model(model)
    for report in reports(model).values():
        if name is None or report.name == name:
            for inserted in report.inserted:
                for own, parameter in model.get_submodule(inserted.path).named_parameters():
                    if id(parameter) not in seen:
                        seen.add(id(parameter))
                        yield f"{inserted.path}.{own}", parameter


def plain_state(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Return the tensors that inference needs of inserted modules, of all splices or of some.

    They are the ``plain_state`` of a module that has one (``Reparametrised``), else its
    ``state_dict``. A shared tensor comes once.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for report in [reports(model)[name] for name in (names or reports(model))]:
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


def full_state(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Return parameters and persistent buffers of inserted modules, of all splices or of some."""
    found: dict[str, Tensor] = {}
    for name in reports(model) if names is None else names:
        inserted = reports(model)[name].inserted
        found |= state_of_modules({i.path: model.get_submodule(i.path) for i in inserted})
    return found


def state_of_modules(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return parameters and persistent buffers of modules of one splice, which are given by path.

    A parameter that several of them share comes once, under its first name.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in modules.items():
        own: dict[str, Tensor] = dict(module.named_parameters())
        own = {name: tensor for name, tensor in own.items() if id(tensor) not in seen}
        seen.update(map(id, own.values()))
        buffers = dict(module.named_buffers())
        own |= {n: buffers[n] for n in module.state_dict() if n in buffers}
        found |= {f"{path}.{name}": tensor for name, tensor in own.items()}
    return found


def in_use_or_trained(model: nn.Module) -> list[str]:
    """Return the splices of a checkpoint: all but those that are off and frozen (references)."""
    on = in_use(model)
    trained = {n for n in on if any(p.requires_grad for _, p in spliced_parameters(model, n))}
    return [name for name, share in on.items() if share or name in trained] or list(on)


def expected(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the splices that these saved tensors must hold: a checkpoint's, and others in it."""
    needed = in_use_or_trained(model)
    own = {n: {f"inserted.{key}" for key in full_state(model, [n])} for n in reports(model)}
    return [name for name, keys in own.items() if name in needed or tensors.keys() & keys]


def kept_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the base that are saved along, by name.

    They are the parameters that ``freeze_base`` left trainable, and the buffers beside them.
    """
    own = base_tensors(model)
    return {name: own[name] for name in look_up(model).kept}


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model, by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
