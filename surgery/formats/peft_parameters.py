"""Say how PEFT lays out LoRA of a parameter, which its ``target_parameters`` name.

    PEFT    W_e + s B_e A_e      A (E r, in), B (out, r E) of a stack W (E, out, in); E and r in
                                 this order in A, and in the other in B
            W_e + s A_e^T B_e^T  where the module has ``is_transposed``: W (E, in, out)
            W + s B A            A (r, columns of W), B (rows of W, r) of a matrix
    here    a (E, r, in), b (E, r, out)

PEFT wraps the module once for each parameter, and each wrapper holds the one before it. So the
factors of the last one are at the path of the module, and those of the one before that at
``path.base_layer``. The order is that of the module's parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from surgery.errors import shown
from surgery.formats.foreign import Foreign, option
from surgery.plugin import Port

Shape = tuple[int, ...]


def targeted(adapter: Foreign, model: nn.Module) -> dict[str, list[str]]:
    """Return the names of the parameters that an adapter's config chooses, by their modules.

    Raises:
        StoreError: ``target_parameters`` is no list of names.
    """
    names: Any = option(adapter, "target_parameters", [], list)
    if not all(isinstance(name, str) and name for name in names):
        raise adapter.refuse(
            f"its config has target_parameters={shown(names)}; names must stand there."
        )
    wanted = frozenset(names)
    found = {path: _chosen(path, module, wanted) for path, module in model.named_modules()}
    return {path: chosen for path, chosen in found.items() if chosen}


def require_parameters(adapter: Foreign, model: nn.Module) -> None:
    """Raise unless the model has a parameter of each name that an adapter's config chooses.

    Raises:
        StoreError: it has none of one name.
    """
    names = option(adapter, "target_parameters", [], list)
    found = {
        end for own in targeted(adapter, model).values() for each in own for end in _ends(each)
    }
    if lost := next((name for name in names if name not in found), None):
        raise adapter.refuse(
            f"its config has target_parameters={shown(names)}, and this model has no parameter "
            f"whose name ends with {shown(lost)}."
        )


def _chosen(path: str, module: nn.Module, names: frozenset[str]) -> list[str]:
    if not names or not path:
        return []
    own = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
    return [name for name in own if not names.isdisjoint(_ends(name))]


def _ends(name: str) -> list[str]:
    """Return the names that PEFT finds a parameter by: its own, and what follows each dot."""
    parts = name.split(".")
    return [".".join(parts[at:]) for at in range(len(parts))]


def parameter_at(
    adapter: Foreign, key: str, parts: list[str], chosen: Mapping[str, list[str]]
) -> str | None:
    """Return the parameter that a wrapper at a path updates; None if it wraps a whole module.

    Raises:
        StoreError: the config chooses fewer parameters of that module.
    """
    path = [part for part in parts if part != "base_layer"]
    depth, names = len(parts) - len(path), chosen.get(".".join(path))
    if names is None or parts[: len(path)] != path:
        return None
    if depth >= len(names):
        raise adapter.refuse(
            f"{key} belongs to one of {depth + 1} parameters of {'.'.join(path)}, and its config "
            f"chooses {', '.join(names)} of these."
        )
    return names[-1 - depth]


def paths_of_wrappers(model: nn.Module, updated: Collection[str]) -> dict[str, str]:
    """Return the paths that PEFT's wrappers of these parameters have, by the parameters."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        own = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
        names = [name for name in own if name in updated]
        for depth, name in enumerate(reversed(names)):
            found[name] = path + ".base_layer" * depth
    return found


def _other_way(model: nn.Module, name: str, port: Port) -> bool:
    """Whether PEFT takes the input of a parameter's map for its output."""
    stacked = model.get_parameter(name).dim() == 3
    owner = model.get_submodule(name.rpartition(".")[0])
    in_out = stacked and bool(getattr(owner, "is_transposed", False))
    return port.transposed == in_out


def parameter_shapes(model: nn.Module, name: str, port: Port, rank: int) -> tuple[Shape, Shape]:
    """Return the shapes of A and B that PEFT gives to a parameter."""
    weight = model.get_parameter(name)
    rows = rank * (len(weight) if weight.dim() == 3 else 1)
    out, width = weight.shape[-2:]
    if port.transposed == _other_way(model, name, port):
        out, width = width, out
    return (rows, width), (out, rows)


def parameter_here(
    model: nn.Module, name: str, port: Port, a: Tensor, b: Tensor
) -> dict[str, Tensor]:
    """Return the tensors of the inserted module for PEFT's A and B of a parameter."""
    weight = model.get_parameter(name)
    if weight.dim() == 3:
        experts = len(weight)
        a = a.reshape(experts, -1, a.shape[-1])  # (E, r, in)
        b = b.reshape(len(b), -1, experts).permute(2, 1, 0)  # (E, r, out)
    else:
        b = b.T
    return {"a": b, "b": a} if _other_way(model, name, port) else {"a": a, "b": b}


def stack_of(
    model: nn.Module, name: str, port: Port, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """Return PEFT's A (E r, in) and B (out, r E) for a (E, r, in) and b (E, r, out)."""
    if _other_way(model, name, port):
        a, b = b, a
    return a.flatten(0, 1).contiguous(), b.permute(2, 1, 0).flatten(1).contiguous()
