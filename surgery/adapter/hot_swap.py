"""Write the weights of a saved adapter into a splice that is there: no new module, no new graph."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn

from surgery.adapter.claims import fill, misfit
from surgery.adapter.loading import bound, moved, saved_method
from surgery.adapter.reading import read
from surgery.errors import SpliceError, StoreError
from surgery.interop import outside_inference_mode
from surgery.splicer import Report, atomically, reports, require_spliced, spliced_model


@outside_inference_mode
def hotswap(model: nn.Module, name: str, folder: str | os.PathLike[str]) -> nn.Module:
    """Replace the weights of one splice by those of a saved adapter of the same kind.

    All graphs stay, compiled ones included. A forward that runs meanwhile in another thread may see
    some weights of each adapter.

    Args:
        model: a spliced model.
        name: the splice; it has the methods, options and sites of the adapter.
        folder: the folder that ``save`` was given. An adapter of several splices must have one of
            this name.

    Returns:
        the model.

    Raises:
        SpliceError: nothing is spliced in under that name, or it is partly merged.
        StoreError: files are missing or damaged, or the adapter is of another kind. Nothing has
            changed.

    Example:
        ``surgery.hotswap(model, "customer", "adapters/42")``
    """
    whole = spliced_model(model)
    require_spliced(whole, name)
    description, tensors = read(folder, bound(whole))
    report, saved = reports(whole)[name], _saved(description, name, folder)
    if report.merged:
        raise SpliceError(
            f"splice {name!r} is partly merged into the base, so other weights would stand beside "
            "what is folded. Call surgery.unmerge first."
        )
    _require_same_kind(report, saved, folder)
    places = [i.path for i in report.inserted]
    own = tuple(f"inserted.{path}." for path in saved["modules"])
    mine = {key: tensor for key, tensor in tensors.items() if key.startswith(own)}
    ours: dict[str, Tensor] = moved(mine, saved["modules"], places)
    alone = {**description, "splices": [saved], "kept": [], "rows": {}}
    atomically(whole, lambda before: fill(whole, alone, ours, folder, [name], before))
    return model


def _saved(description: dict[str, Any], name: str, folder: Any) -> dict[str, Any]:
    """Return the description of the splice that is meant."""
    if description["kept"] or description["rows"]:
        brought = [*description["kept"], *description["rows"]]
        raise StoreError(
            f"the adapter in {folder} brings its own {', '.join(brought[:3])}, which all splices "
            "of a model share. Load it into a model of its own."
        )
    splices: list[dict[str, Any]] = description["splices"]
    found = splices if len(splices) == 1 else [s for s in splices if s["name"] == name]
    if not found:
        names = ", ".join(s["name"] for s in splices)
        raise StoreError(f"the adapter in {folder} has the splices {names}, and none {name!r}.")
    return found[0]


def _require_same_kind(report: Report, saved: dict[str, Any], folder: Any) -> None:
    """Raise unless a saved splice has the methods, options and places of this one."""
    methods = [saved_method(m, folder) for m in saved["methods"]]
    pairs = [
        ("methods", list(map(repr, methods)), list(map(repr, report.methods))),
        (
            "places",
            [path.rpartition(".")[0] for path in saved["modules"]],
            [i.path.rpartition(".")[0] for i in report.inserted],
        ),
    ]
    for what, there, here in pairs:
        if there != here:
            raise StoreError(misfit(folder, what, there, here))
