"""Load a saved adapter: splice it into a base again, or leave the base as it was.

    download from the hub if there is no such folder     adapter/downloading.py
    read the files, check their digest                   adapter/reading.py
    find the sites of the saved paths, compare shapes    every misfit is reported
    compare claims with tensors, before memory is taken  adapter/claims.py
    compare the fingerprint                              other weights are a warning
    splice the saved methods, under the saved names      as in the first model
    copy the tensors; note what was trained along        after this nothing can fail

Whatever can fail comes before the tensors are copied; if a step fails, the model is put back as it
was (splicer/all_or_nothing.py).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from surgery.adapter.claims import (
    fill,
    misfit,
    require_asked,
    require_base,
    require_inserted,
)
from surgery.adapter.downloading import local_folder
from surgery.adapter.fingerprint import warn_of_other_weights
from surgery.adapter.opening import opened
from surgery.adapter.parameters import expected
from surgery.adapter.reading import read
from surgery.adapter.row_training import train_rows
from surgery.adapter.saving import site_shape
from surgery.adapter.training import keep_also, warn_of_replaced
from surgery.errors import RefusedError, StoreError
from surgery.interop import outside_inference_mode
from surgery.locator import locate
from surgery.plugin import Method, Site, Sites, method
from surgery.splicer import Before, atomically, put_in_use, require_free, splice

# The file of an adapter has at most four times the bytes of its base, and so many more: it may
# hold float32 where the base has eight bits, and a small base may have a large adapter.
_TIMES, _MORE = 4, 512 << 20


@outside_inference_mode
def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    example_inputs: Any = None,
    name: str | None = None,
    keep: Sequence[str] = (),
    revision: str | None = None,
    subfolder: str = "",
) -> nn.Module:
    """Splice a saved adapter into a base model, in place. Warn if the base has other weights.

    What is loaded is on, as far as it was when it was saved (``use``). A splice that was off is off
    if another one that was saved with it was on.

    To continue training, call ``freeze_base`` with the same ``keep``, then ``train_rows``, as
    before.

    Args:
        model: the base; its sites must have the shapes that the adapter was made for.
        folder: the folder that ``save`` was given, or ``OWNER/NAME`` on the Hugging Face hub if
            there is no such folder.
        example_inputs: as for :func:`surgery.locate`.
        name: the name of the splice in this model; by default the name that it was saved under. An
            adapter that consists of several splices keeps their names.
        keep: names of modules or tensors of the base that the adapter may replace beside heads and
            rows. What else it replaces is told by a warning; a whole embedding is refused.
        revision: a branch, tag or commit on the hub.
        subfolder: the folder in ``folder``, or in the repository, that holds the adapter.

    Returns:
        the model.

    Raises:
        StoreError: files are missing or damaged, the base does not fit, or the adapter would write
            to what it may not. Nothing has changed.
        SpliceError: a splice of that name is there already. Nothing has changed.

    Example:
        ``model = surgery.load(base, "adapter")``
    """
    local = local_folder(folder, bound(model), revision, subfolder)
    description, tensors, sites = opened(model, local, example_inputs, bound(model))
    if name is not None:
        _require_one(description["splices"], name, folder)
    for saved in description["splices"]:
        require_free(model, name or saved["name"])
    sites = locate(model, example_inputs) if sites is None else sites
    load_opened(model, (description, tensors, sites), local, name, keep)
    return model


def load_opened(
    model: nn.Module,
    found: tuple[dict[str, Any], dict[str, Tensor], Sites],
    folder: Any,
    name: str | None = None,
    keep: Sequence[str] = (),
) -> None:
    """Splice an adapter that has been opened into a model with these sites, as ``load`` does."""
    description, tensors, sites = found
    made = [[saved_method(m, folder) for m in saved["methods"]] for saved in description["splices"]]
    plans = [
        (saved, matched_sites(saved, methods, sites, folder))
        for methods, saved in zip(made, description["splices"], strict=True)
    ]
    require_base(model, description, tensors, folder)
    require_asked(model, description, sites, keep, folder)
    for methods, (saved, at) in zip(made, plans, strict=True):
        with _refused(folder):
            require_inserted(model, methods, at, saved, tensors, folder)
    known = description["base"]["fingerprint"]
    if isinstance(known, dict):  # early files have a digest of shapes here
        warn_of_other_weights(model, known, folder)
    kept = {n: tensors[f"kept.{n}"] for n in description["kept"]}
    warn_of_replaced(model, kept, folder)
    todo = list(zip(made, plans, strict=True))
    atomically(
        model, lambda before: _insert(model, description, tensors, todo, name, folder, before)
    )


def _insert(
    model: nn.Module, description: dict[str, Any], tensors: dict[str, Tensor],
    todo: list[tuple[list[Method], tuple[dict[str, Any], Sites]]], name: str | None, folder: Any,
    before: Before,
) -> None:  # fmt: skip
    """Splice the saved methods, copy the tensors, and note what was trained along."""
    done: list[str] = []
    saved_paths: list[str] = []
    own_paths: list[str] = []
    for methods, (saved, at) in todo:
        with _refused(folder):
            report = splice(model, methods, at=at, name=name or saved["name"])
        done.append(report.name)
        paths = [i.path for i in report.inserted]
        saved_paths += saved["modules"]
        own_paths += paths
        if [p.rpartition(".")[0] for p in paths] != [
            p.rpartition(".")[0] for p in saved["modules"]
        ]:
            raise StoreError(misfit(folder, "inserted modules", saved["modules"], paths))
    tensors = moved(tensors, saved_paths, own_paths)  # at once: two splices may swap paths
    fill(model, description, tensors, folder, done, before)
    keep_also(model, description["kept"])
    for parameter, chosen in description["rows"].items():
        train_rows(model, parameter, chosen)
    shares = description["in_use"]
    if any(shares.values()) and {*shares.values()} != {1}:
        with _refused(folder):
            put_in_use(model, {name or old: share for old, share in shares.items()})


def _require_one(splices: list[dict[str, Any]], name: str, folder: Any) -> None:
    """Raise if an adapter of several splices is to be loaded under one name."""
    if len(splices) > 1:
        raise StoreError(
            f"the adapter in {folder} consists of the splices "
            f"{', '.join(s['name'] for s in splices)}, so it cannot be named {name!r}. Leave "
            "name= out."
        )


def moved(tensors: dict[str, Tensor], saved: list[str], here: list[str]) -> dict[str, Tensor]:
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

    Example:
        ``surgery.restore(model, "adapter")``
    """
    description, tensors = read(folder, bound(model))
    require_base(model, description, tensors, folder)
    require_asked(model, description, Sites([]), (), folder)
    names = expected(model, tensors)
    atomically(model, lambda before: fill(model, description, tensors, folder, names, before))
    return model


def bound(model: nn.Module) -> int:
    """Return how many bytes the file of an adapter of this model may have."""
    tensors = [*model.parameters(), *model.buffers()]
    return _TIMES * sum(x.numel() * x.element_size() for x in tensors) + _MORE


@contextmanager
def _refused(folder: Any) -> Iterator[None]:
    """Turn the refusal of what an adapter asks for into a StoreError that names its folder."""
    try:
        yield
    except StoreError:
        raise
    except RefusedError as error:
        raise StoreError(f"the adapter in {folder} cannot be loaded here: {error}") from error


def saved_method(saved: dict[str, Any], folder: Any) -> Method:
    """Return a method by its saved name and options."""
    try:
        return method(saved["name"], **saved["options"])
    except RefusedError as error:
        raise StoreError(
            f"the adapter in {folder} cannot be loaded here: {error} Install the plugin that the "
            "adapter was made with, in the same version."
        ) from error


def matched_sites(saved: dict[str, Any], methods: list[Method], sites: Sites, folder: Any) -> Sites:
    """Return the sites of this model that a saved splice was made at.

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
        picked = tuple(shape.get("picked", ()))
        site = dataclasses.replace(site, picked=picked) if picked else site
        own = site_shape(site)
        differing = [k for k in shape if shape[k] != own.get(k)]
        lacking = [port for port in picked if port not in site.ports]
        if differing or lacking:
            lines = [f"{k} {shape[k]} in the adapter, {own.get(k)} here" for k in differing]
            what = ", ".join([*lines, *(f"no port {port!r} here" for port in lacking)])
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
    asked = {kind for method in methods for kind in method.kinds} - {"attention", "ffn", "linear"}
    first = [site for site in chosen if site.kind not in asked]  # the others come by their kind
    return Sites(first, others=[site for site in chosen if site not in first])
