"""Open an adapter for one model, whichever library has saved it.

own format      surgery.json and its tensors, as they are           adapter/reading.py
another one     read and translated into a description and tensors of the own format,
                so that the rest of ``load`` knows one format only   surgery/formats
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn

from surgery.adapter.manifest import FORMAT
from surgery.adapter.reading import read
from surgery.adapter.saving import site_shape
from surgery.formats import Translation, read_foreign, translated
from surgery.locator import locate
from surgery.plugin import Sites
from surgery.splicer import rehearse

Opened = tuple[dict[str, Any], dict[str, Tensor], Sites | None]


def opened(
    model: nn.Module, folder: str | os.PathLike[str], example_inputs: Any, at_most: int
) -> Opened:
    """Return description and tensors of an adapter; the model's sites, where they were needed.

    Raises:
        StoreError: a file is missing or damaged, or something in it has no place here.
    """
    foreign = read_foreign(folder, at_most)
    if foreign is None:
        return *read(folder, at_most), None
    sites = locate(model, example_inputs)
    return *described(model, translated(foreign, model, sites)), sites


def described(
    model: nn.Module, found: Translation, name: str = "default"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return an adapter of another library as the own format would hold it."""
    tensors: dict[str, Tensor] = {}
    modules: list[str] = []
    seen: dict[int, Any] = {}  # parameters that several modules share come once
    for path, edit, module in rehearse(model, found.methods, found.sites):
        own = f"{path}.{edit.child}_{len(modules)}" if path else f"{edit.child}_{len(modules)}"
        modules.append(own)
        for parameter, wanted in module.named_parameters():
            value = found.value(path, edit, parameter)
            if value is not None and id(wanted) not in seen:
                tensors[f"inserted.{own}.{parameter}"] = value
            seen[id(wanted)] = wanted
    tensors |= {f"kept.{n}": tensor for n, tensor in found.kept.items()}
    tensors |= {f"rows.{n}": rows for n, (_, rows) in found.rows.items()}
    splice = {
        "name": name,
        "methods": [{"name": m.name, "options": m.options()} for m in found.methods],
        "sites": [site_shape(site) for site in [*found.sites, *found.sites.others]],
        "modules": modules,
    }
    description = {
        "format": FORMAT,
        "base": {"fingerprint": ""},
        "kept": list(found.kept),
        "rows": {n: numbers for n, (numbers, _) in found.rows.items()},
        "splices": [splice],
        "in_use": {},
    }
    return description, tensors
