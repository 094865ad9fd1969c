"""Write the weights of a saved adapter into a splice that is there: no new module, no new graph.

A LoRA of another scale keeps the scale that is there, which graphs hold, and its B and c are
multiplied by the ratio: s' B = s (s' / s B).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from surgery.adapter.claims import fill, misfit
from surgery.adapter.loading import bound, matched_sites, moved, saved_method
from surgery.adapter.opening import opened
from surgery.errors import SpliceError, StoreError
from surgery.interop import outside_inference_mode
from surgery.locator import locate
from surgery.plugin import Edit, Method, Sites
from surgery.splicer import (
    Report,
    atomically,
    rehearse,
    reports,
    require_spliced,
    spliced_model,
)

Place = tuple[Any, ...]
_SCALED = ("b", "bias")  # of a LoRA

_LOW_RANK = ("lora", "dora")  # methods whose B can take up another scale


@outside_inference_mode
def hotswap(
    model: nn.Module, name: str, folder: str | os.PathLike[str], example_inputs: Any = None
) -> nn.Module:
    """Replace the weights of one splice by those of a saved adapter of the same kind.

    All graphs stay, compiled ones included. A forward that runs meanwhile in another thread may see
    some weights of each adapter.

    Args:
        model: a spliced model.
        name: the splice; it has the methods, options and sites of the adapter, but for the scale of
            a LoRA (alpha), which may be another.
        folder: the folder that ``save`` was given, or one that PEFT has saved. An adapter of
            several splices must have one of this name.
        example_inputs: as for :func:`surgery.locate`; for an adapter of PEFT or of another scale.

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
    description, tensors, sites = opened(whole, folder, example_inputs, bound(whole))
    report, saved = reports(whole)[name], _saved(description, name, folder)
    if report.merged:
        raise SpliceError(
            f"splice {name!r} is partly merged into the base, so other weights would stand beside "
            "what is folded. Call surgery.unmerge first."
        )
    methods = [saved_method(m, folder) for m in saved["methods"]]
    here = [i.path for i in report.inserted]
    there: list[str] = saved["modules"]
    own = tuple(f"inserted.{path}." for path in there)
    mine = {key: tensor for key, tensor in tensors.items() if key.startswith(own)}
    alike = sites is None and list(map(repr, methods)) == list(map(repr, report.methods))
    if alike:
        _require("places", folder, _hosts(there), _hosts(here))
    else:
        kinds = [_kind(methods, sites is not None), _kind(report.methods, sites is not None)]
        _require("methods", folder, *kinds)
        sites = locate(whole, example_inputs) if sites is None else sites
        at = matched_sites(saved, methods, sites, folder)
        there, ratios = _paired(whole, report, methods, at, there, folder)
        for key in mine:
            path, _, parameter = key.removeprefix("inserted.").rpartition(".")
            if parameter in _SCALED and ratios.get(path, 1) != 1:
                mine[key] = mine[key] * ratios[path]
    ours: dict[str, Tensor] = moved(mine, there, here)
    saved = {**saved, "modules": there}
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


def _kind(methods: Iterable[Method], foreign: bool) -> list[str]:
    """Return what must be equal of methods: of LoRA and DoRA all but the scale.

    Of one of another library the shapes alone: its options of ports and ranks say the same in
    other words, and its dropout stays as it is here.
    """
    found = []
    for method in methods:
        left = {n: x for n, x in method.options().items() if n not in ("alpha", "alphas", "rslora")}
        if method.name in _LOW_RANK:
            options = "" if foreign else ", ".join(f"{n}={x!r}" for n, x in left.items())
            found.append(f"{method.name}({options})")
        else:
            found.append(repr(method))
    return sorted(found)


def _paired(
    model: nn.Module, report: Report, methods: list[Method], sites: Sites, saved: list[str],
    folder: Any,
) -> tuple[list[str], dict[str, float]]:  # fmt: skip
    """Return the saved modules in the order of those here, and the ratios of scales by path."""
    made: dict[Place, tuple[str, Any]] = {}
    counted: Counter[Place] = Counter()
    for own, (path, edit, module) in zip(saved, rehearse(model, methods, sites), strict=True):
        made[_place(path, edit, counted)] = own, getattr(module, "scale", None)
    counted.clear()
    wanted = [_place(i.site.path, i.edit, counted) for i in report.inserted]
    if {*wanted} != {*made}:
        _require("places", folder, sorted(map(str, made)), sorted(map(str, wanted)))
    ratios = {}
    for inserted, place in zip(report.inserted, wanted, strict=True):
        path, scale = made[place]
        now: Any = getattr(model.get_submodule(inserted.path), "scale", None)
        if inserted.method.name in _LOW_RANK and scale != now:
            ratios[path] = scale / now
    return [made[place][0] for place in wanted], ratios


def _place(path: str, edit: Edit, counted: Counter[Place]) -> Place:
    """Return what tells the place of a module from those of all others of its splice."""
    place = (path, edit.site, edit.kind, edit.port, edit.verb)
    counted[place] += 1
    return (*place, counted[place])


def _hosts(paths: Iterable[str]) -> list[str]:
    return [path.rpartition(".")[0] for path in paths]


def _require(what: str, folder: Any, there: list[str], here: list[str]) -> None:
    """Raise unless a saved splice has the same as this one."""
    if there != here:
        raise StoreError(misfit(folder, what, there, here))
