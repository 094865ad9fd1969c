"""Load a saved adapter: splice it into a base again, or leave the base as it was.

    read the files, check their digest                   files.py
    find the sites of the saved paths, compare shapes    every misfit is reported
    compare the fingerprint                              other weights are a warning
    splice the saved methods, under the saved names      as in the first model
    copy the tensors; note what was trained along        after this nothing can fail

Whatever can fail comes before the tensors are copied; if a splice fails, those before it are
removed.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from surgery.adapter.atomic_write import read
from surgery.adapter.fingerprint import warn_of_other_weights
from surgery.adapter.parameters import full_state
from surgery.adapter.row_training import rows_fit, train_rows
from surgery.adapter.saving import site_shape
from surgery.adapter.training import base_tensors, keep_also, warn_of_replaced
from surgery.errors import MethodError, StoreError
from surgery.interop import like, outside_inference_mode
from surgery.locator import locate
from surgery.plugin import Method, Site, Sites, method
from surgery.splicer import remove, reports, splice


@outside_inference_mode
def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    example_inputs: Any = None,
    name: str | None = None,
) -> nn.Module:
    """Splice a saved adapter into a base model, in place. Warn if the base has other weights.

    To continue training, call ``freeze_base`` with the same ``keep``, then ``train_rows``, as
    before.

    Args:
        model: the base; its sites must have the shapes that the adapter was made for.
        folder: the folder that ``save`` was given.
        example_inputs: as for :func:`surgery.locate`.
        name: the name of the splice in this model; by default the name that it was saved under. An
            adapter that consists of several splices keeps their names.

    Returns:
        the model.

    Raises:
        StoreError: files are missing or damaged, or the base does not fit. Nothing has changed.
    """
    description, tensors = read(folder)
    if name is not None:
        _require_one(description["splices"], name, folder)
    sites = locate(model, example_inputs)
    plans = [_match(saved, sites, folder) for saved in description["splices"]]
    rows = description["rows"]
    _check_kept(model, tensors, folder)
    _check_rows(model, tensors, rows, folder)
    known = description["base"]["fingerprint"]
    if isinstance(known, dict):  # early files have a digest of shapes here
        warn_of_other_weights(model, known, folder)
    kept = {n: tensors[f"kept.{n}"] for n in description["kept"]}
    warn_of_replaced(model, kept, folder)
    done: list[str] = []
    try:
        for saved, at in plans:
            methods = [_method(m, folder) for m in saved["methods"]]
            report = splice(model, methods, at=at, name=name or saved["name"])
            done.append(report.name)
            paths = [i.path for i in report.inserted]
            if name is not None or paths != saved["modules"]:
                tensors = _moved(tensors, saved["modules"], paths)
            if [p.rpartition(".")[0] for p in paths] != [
                p.rpartition(".")[0] for p in saved["modules"]
            ]:
                raise StoreError(_misfit(folder, "inserted modules", saved["modules"], paths))
        _fill(model, tensors, rows, folder, done)
    except BaseException:
        for each in reversed(done):
            remove(model, each)
        raise
    keep_also(model, description["kept"])
    for parameter, chosen in rows.items():
        train_rows(model, parameter, chosen)
    return model


def _require_one(splices: list[dict[str, Any]], name: str, folder: Any) -> None:
    """Raise if an adapter of several splices is to be loaded under one name."""
    if len(splices) > 1:
        raise StoreError(
            f"the adapter in {folder} consists of the splices "
            f"{', '.join(s['name'] for s in splices)}, so it cannot be named {name!r}. Leave "
            "name= out."
        )


def _moved(tensors: dict[str, Tensor], saved: list[str], here: list[str]) -> dict[str, Tensor]:
    """Return the tensors with the paths of the saved modules replaced by those in this model."""
    moved = {f"inserted.{a}.": f"inserted.{b}." for a, b in zip(saved, here, strict=False)}
    found = {}
    for key, tensor in tensors.items():
        old = next((path for path in moved if key.startswith(path)), None)
        found[key if old is None else moved[old] + key.removeprefix(old)] = tensor
    return found


def restore(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Copy saved tensors back into the spliced model that they were saved from, or one like it.

    Raises:
        StoreError: files are missing or damaged, or other modules are spliced into the model.
    """
    description, tensors = read(folder)
    rows = description["rows"]
    _check_kept(model, tensors, folder)
    _check_rows(model, tensors, rows, folder)
    _fill(model, tensors, rows, folder, list(reports(model)))
    return model


def _method(saved: dict[str, Any], folder: Any) -> Method:
    """Return a method by its saved name and options."""
    try:
        return method(saved["name"], **saved["options"])
    except MethodError as error:
        raise StoreError(
            f"the adapter in {folder} cannot be loaded here: {error} Install the plugin that the "
            "adapter was made with, in the same version."
        ) from error


def _match(saved: dict[str, Any], sites: Sites, folder: Any) -> tuple[dict[str, Any], Sites]:
    """Return a saved splice with the sites of this model that it was made at.

    Raises:
        StoreError: a site is missing or has another shape; the message lists the first five.
    """
    known = {(s.path, s.key, s.kind): s for s in [*sites, *sites.others]}
    chosen: list[Site] = []
    wrong: list[str] = []
    for shape in saved["sites"]:
        site = known.get((shape["path"], shape["key"], shape["kind"]))
        if site is None:
            wrong.append(f"{shape['path']}: no such {shape['kind']} site")
            continue
        own = site_shape(site)
        differing = [k for k in shape if shape[k] != own[k]]
        if differing:
            what = ", ".join(f"{k} {shape[k]} in the adapter, {own[k]} here" for k in differing)
            wrong.append(f"{site.path}: {what}")
        chosen.append(site)
    if wrong:
        more = f"\n  and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise StoreError(
            f"the adapter in {folder} does not fit this model:\n  "
            + "\n  ".join(wrong[:5])
            + more
            + "\nLoad it into the base that it was made for (see 'base' in surgery.json)."
        )
    first = [site for site in chosen if site.kind in ("attention", "ffn", "linear")]
    return saved, Sites(first, others=[site for site in chosen if site not in first])


def _check_kept(model: nn.Module, tensors: dict[str, Tensor], folder: Any) -> None:
    """Raise if the base lacks a kept tensor, or has one of another shape."""
    own = base_tensors(model)
    for key, tensor in tensors.items():
        name = key.removeprefix("kept.")
        if key.startswith("kept.") and (name not in own or own[name].shape != tensor.shape):
            here = tuple(own[name].shape) if name in own else "not there"
            raise StoreError(_misfit(folder, name, tuple(tensor.shape), here))


def _check_rows(
    model: nn.Module, tensors: dict[str, Tensor], rows: dict[str, list[int]], folder: Any
) -> None:
    """Raise if the base lacks a parameter of which rows were saved, or one of the rows."""
    for name, chosen in rows.items():
        if not rows_fit(model, name, chosen, tensors[f"rows.{name}"]):
            raise StoreError(
                f"the adapter in {folder} has rows {chosen[:5]} of {name}, which this model lacks. "
                "If they are new tokens, add them first: take the tokenizer that was saved with "
                "the adapter and call model.resize_token_embeddings(len(tokenizer))."
            )


def _fill(
    model: nn.Module, tensors: dict[str, Tensor], rows: dict[str, list[int]], folder: Any,
    names: list[str],
) -> None:  # fmt: skip
    """Copy saved tensors into the splices of these names and into the base, all or none."""
    own = base_tensors(model)
    wanted: dict[str, Tensor] = {f"inserted.{n}": t for n, t in full_state(model, names).items()}
    wanted |= {k: own[k.removeprefix("kept.")] for k in tensors if k.startswith("kept.")}
    wanted |= {f"rows.{name}": own[name].detach()[chosen] for name, chosen in rows.items()}
    missing, unexpected = sorted(wanted.keys() - tensors), sorted(tensors.keys() - wanted)
    if missing or unexpected:
        raise StoreError(
            f"the adapter in {folder} lacks the tensors {missing[:5]} and has {unexpected[:5]}, "
            "which have no place in this model. See 'splices' in surgery.json for the methods and "
            "options that it was made with."
        )
    for key, target in wanted.items():
        if target.shape != tensors[key].shape:
            raise StoreError(_misfit(folder, key, tuple(tensors[key].shape), tuple(target.shape)))
    with torch.no_grad():
        for key, target in wanted.items():
            target.copy_(like(tensors[key], target))
        for name, chosen in rows.items():
            own[name][chosen] = tensors[f"rows.{name}"].to(own[name])


def _misfit(folder: Any, what: str, saved: Any, here: Any) -> str:
    """Return the message that ``what`` differs between the adapter and this model."""
    return (
        f"the adapter in {folder} does not fit this model: {what}: {saved} in the adapter, {here} "
        "here. Load it into the base that it was made for (see 'base' in surgery.json)."
    )
