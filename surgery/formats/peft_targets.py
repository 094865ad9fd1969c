"""Compare the modules that a PEFT config chooses with those that its tensors update.

    target_modules        a pattern of whole paths; names, which paths end with; or "all-linear"
    target_parameters     names of parameters, which paths end with
    exclude_modules       likewise; modules_to_save are excluded too
    layers_to_transform   numbers of layers, which layers_pattern finds in a path

PEFT updates just the modules that these choose, so a chosen module without tensors means that the
file is not what was saved, and so do tensors of a module that is not chosen.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import nn

from surgery.errors import shown
from surgery.formats.foreign import Foreign, option
from surgery.formats.modules import Ports, projections
from surgery.formats.peft_keys import Keys, own_names
from surgery.formats.peft_parameters import targeted
from surgery.plugin import Sites, are_quick_patterns
from surgery.splicer import reports

Shapes = Callable[[str, Ports], Mapping[str, tuple[int, ...]]]
_HEADS = ("score", "classifier")  # of which PEFT leaves out one for "all-linear"


def require_targets(
    adapter: Foreign, keys: Keys, model: nn.Module, sites: Sites, shapes: Shapes
) -> None:
    """Raise unless the tensors update just the modules of the model that the config chooses.

    Args:
        shapes: returns the names and shapes of the tensors that a module with these ports needs.

    Raises:
        StoreError: they differ, or an option that chooses modules has a wrong type.
    """
    chosen = _chosen(adapter, model)
    if chosen is None:
        return
    chosen |= {name: None for names in targeted(adapter, model).values() for name in names}
    names = own_names(model)
    tied = {
        p for p in keys.modules | chosen if names.get(f"{p}.weight", f"{p}.weight") != f"{p}.weight"
    }
    free = tied if adapter.config.get("ensure_weight_tying") else set()  # updated as the other is
    lacking = [path for path in chosen if path not in keys.modules and path not in free]
    if lacking:
        first, known = lacking[0], projections(sites)
        wanted = shapes(first, known[first]) if first in known else {}
        listed = ", ".join(f"{key} {shape}" for key, shape in wanted.items()) or "any tensor"
        raise adapter.refuse(
            f"it lacks {listed} of {first}, one of {len(lacking)} modules that its config chooses "
            f"and no tensor updates ({_said(adapter)}). Load it into the base that it was made "
            "for, or copy the file of its tensors again."
        )
    beyond = [path for path in keys.modules if path not in chosen and path not in free]
    if beyond:
        key = min(keys.modules[beyond[0]].values())
        raise adapter.refuse(
            f"{shown(key)} {tuple(adapter.tensors[key].shape)} updates {shown(beyond[0])}, which "
            f"its config does not choose ({_said(adapter)})."
        )


def _said(adapter: Foreign) -> str:
    """Return the options that choose modules, as they are set."""
    names = (
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    )
    found = [(name, adapter.config.get(name)) for name in names]
    return ", ".join(f"{name}={shown(value)}" for name, value in found if value is not None)


def texts(adapter: Foreign, name: str) -> str | frozenset[str] | None:
    """Return an option that is a pattern or a list of names.

    Raises:
        StoreError: it is something else.
    """
    value: Any = option(adapter, name, None, str, list)
    if not isinstance(value, list):
        return value  # type: ignore[no-any-return]
    if not all(isinstance(each, str) for each in value):
        raise adapter.refuse(f"its config has {name}={shown(value)}; names must stand there.")
    return frozenset(value)


def _chosen(adapter: Foreign, model: nn.Module) -> dict[str, Any] | None:
    """Return the paths of the modules that the config chooses; None if that cannot be said."""
    targets, excluded = texts(adapter, "target_modules"), texts(adapter, "exclude_modules")
    layers, pattern = _layers(adapter), texts(adapter, "layers_pattern")
    saved = option(adapter, "modules_to_save", [], list)
    if targets is None and adapter.config.get("target_parameters"):
        targets = frozenset()
    if targets is None:
        return None
    every = {"all-linear": targets} if isinstance(targets, str) else {}
    linear = bool(every) and str(targets).lower() in every
    asked = [x for x in (targets, excluded, pattern) if isinstance(x, str) and not linear]
    if isinstance(pattern, frozenset):
        asked += sorted(pattern)
    if not are_quick_patterns(asked):
        warnings.warn(
            f"the adapter in {adapter.where} chooses its modules by patterns that may take for "
            f"ever, so its tensors are not compared with them: {shown(asked)}.",
            stacklevel=6,
        )
        return None
    if isinstance(targets, str) and layers is not None:
        raise adapter.refuse("layers_to_transform has no place beside a pattern of paths.")
    inserted = tuple(f"{i.path}." for r in reports(model).values() for i in r.inserted)
    paths = [p for p, _ in model.named_modules() if p and not f"{p}.".startswith(inserted)]
    if linear:
        targets = frozenset(_linear(model, paths))
    left = [p for p in paths if not any(f".{name}." in f".{p}." for name in saved)]
    left = [p for p in left if excluded is None or not matches(excluded, p)]
    found = (p for p in left if matches(targets, p))
    return dict.fromkeys(p for p in found if layers is None or _layer(p, pattern) in layers)


def matches(names: str | Collection[str], path: str) -> bool:
    """Whether a path is matched by a pattern whole, or ends with one of these names."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    parts = path.split(".")
    return any(".".join(parts[at:]) in names for at in range(len(parts)))


def _layers(adapter: Foreign) -> Collection[int] | None:
    """Return the numbers of the layers that are updated; None if there is no choice of them."""
    value: Any = option(adapter, "layers_to_transform", None, int, list)
    if value is None or value == []:
        return None
    numbers = value if isinstance(value, list) else [value]
    if not all(type(number) is int for number in numbers):
        raise adapter.refuse(
            f"its config has layers_to_transform={shown(value)}; numbers must stand there."
        )
    return frozenset(numbers)


def _layer(path: str, pattern: str | frozenset[str] | None) -> int | None:
    """Return the number of the layer that a path leads through, as PEFT finds it."""
    named = [pattern] if isinstance(pattern, str) else sorted(pattern or ())
    tried = [rf"(?:^|.*?\.){each}\.(?P<at>\d+)\." for each in named if each]
    found = (re.match(each, path) for each in tried or [r".*?\.[^.]*\.(?P<at>\d+)\."])
    first = next((match for match in found if match), None)
    return None if first is None else int(first["at"])


def _linear(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Return the linear layers that PEFT means by "all-linear": all but the head."""
    get: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = get()
    heads = [getattr(model, name, None) for name in _HEADS] if head is None else [head]
    first = next((module for module in heads if module is not None), None)
    modules = {path: model.get_submodule(path) for path in paths}
    return [
        path
        for path, module in modules.items()
        if module is not first
        and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    ]
