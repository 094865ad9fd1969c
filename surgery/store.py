"""Store: a saved adapter is one JSON of what was done and one safetensors file of tensors.

    surgery.json                    methods, options, sites, versions, what the base looked like
    surgery-<digest>.safetensors    inserted tensors, and those of the base that were trained along

The tensors are written first and the JSON, which names them by digest, takes its place last, in
one step: an interrupted save leaves the old adapter whole. ``load`` replays the splice.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from surgery import huggingface
from surgery.adapter_files import FORMAT, JSON, file_of, read, write_whole
from surgery.errors import MethodError, SpliceError, StoreError
from surgery.fingerprint import fingerprint, warn_of_other_weights
from surgery.locate import locate
from surgery.method import Method
from surgery.registry import method, methods
from surgery.report import records
from surgery.rows import fits, train_rows, trained_rows
from surgery.selection import Sites
from surgery.sites import Site
from surgery.splice import remove, splice
from surgery.train import (
    full_state,
    keep_also,
    kept_parameters,
    plain_state,
    spliced_parameters,
    warn_of_replaced,
)


def save(model: nn.Module, folder: str | os.PathLike[str], plain: bool = True) -> Path:
    """Save every splice of a model, and what of its base was trained along, into ``folder``.

    Args:
        model: a spliced model.
        folder: made if it is not there; an older adapter in it is replaced.
        plain: drop what only training needs, and store what it makes (a reparametrised prefix as
            plain keys and values); ``False`` stores all, to go on training from.

    Returns:
        the folder.

    Raises:
        SpliceError: nothing is spliced, or it is partly merged.
    """
    if not records(model):
        raise SpliceError(f"nothing is spliced into this {type(model).__name__}: nothing to save.")
    merged = [report.name for report in records(model).values() if report.merged]
    if merged:
        raise SpliceError(
            f"splice {merged[0]!r} is partly merged into the base, whose weights have changed: an "
            "adapter alone would not hold that. Save it before merging, or save the whole model."
        )
    own = dict(model.named_parameters())
    _warn_of_methods_not_offered(model)
    inserted = plain_state(model) if plain else full_state(model)
    tensors = {f"inserted.{name}": t for name, t in inserted.items()}
    tensors |= {f"kept.{name}": own[name] for name in kept_parameters(model)}
    tensors |= {f"rows.{name}": own[name][rows] for name, rows in trained_rows(model).items()}
    data = save_tensors({n: t.detach().cpu().contiguous() for n, t in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    file = f"surgery-{digest[:12]}.safetensors"
    description = {
        "format": FORMAT,
        "tensors": file,
        "sha256": digest,
        "versions": {"surgery": _version(), "torch": str(torch.__version__)},
        "base": {
            "class": type(model).__name__,
            "name": huggingface.name_or_path(model),
            "fingerprint": fingerprint(model, _trained(model)),
        },
        "kept": kept_parameters(model),
        "rows": trained_rows(model),
        "splices": [_describe(report, plain) for report in records(model).values()],
    }
    text = json.dumps(description, indent=1).encode()
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    before = file_of(target)
    write_whole(target / file, data)
    write_whole(target / JSON, text)
    if before not in ("", file):  # and no other: somebody else may be saving here, too
        (target / before).unlink(missing_ok=True)
    return target


def load(model: nn.Module, folder: str | os.PathLike[str], example_inputs: Any = None) -> nn.Module:
    """Splice a saved adapter into a base model, in place. Warns if the base has other weights.

    To go on training, call ``freeze_base`` with the same ``keep``, then ``train_rows``, as before.

    Args:
        model: the base; its sites must have the shapes that the adapter was made for.
        folder: where ``save`` put it.
        example_inputs: as for :func:`surgery.locate`.

    Returns:
        the model.

    Raises:
        StoreError: files are missing or damaged, or the base does not fit. Nothing has changed.
    """
    description, tensors = read(folder)
    sites = locate(model, example_inputs)
    plans = [_match(saved, sites, folder) for saved in description["splices"]]
    rows = description["rows"]
    _check_kept(model, tensors, folder)
    _check_rows(model, tensors, rows, folder)
    known = description["base"]["fingerprint"]
    if isinstance(known, dict):  # it was a digest of shapes once
        warn_of_other_weights(model, known, folder)
    kept = {n: tensors[f"kept.{n}"] for n in description["kept"]}
    warn_of_replaced(model, kept, folder)
    done: list[str] = []
    try:
        for saved, at in plans:
            methods = [_method(m, folder) for m in saved["methods"]]
            report = splice(model, methods, at=at, name=saved["name"])
            done.append(saved["name"])
            made = [i.path for i in report.inserted]
            if made != saved["modules"]:
                raise StoreError(_misfit(folder, "inserted modules", saved["modules"], made))
        _fill(model, tensors, rows, folder, done)
    except BaseException:
        for name in reversed(done):
            remove(model, name)
        raise
    keep_also(model, description["kept"])
    for name, chosen in rows.items():
        train_rows(model, name, chosen)
    return model


def restore(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Put saved tensors back into a model that is spliced as it was when they were saved.

    Raises:
        StoreError: files are missing or damaged, or the model is spliced otherwise.
    """
    description, tensors = read(folder)
    rows = description["rows"]
    _check_kept(model, tensors, folder)
    _check_rows(model, tensors, rows, folder)
    _fill(model, tensors, rows, folder, list(records(model)))
    return model


def _trained(model: nn.Module) -> set[str]:
    """Parameters that are no part of the base as it was: inserted, or trained along."""
    inserted = {id(parameter) for _, parameter in spliced_parameters(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in inserted}
    return names | set(kept_parameters(model)) | set(trained_rows(model))


def _warn_of_methods_not_offered(model: nn.Module) -> None:
    used = {m.name: type(m) for report in records(model).values() for m in report.methods}
    unknown = [name for name, cls in used.items() if methods().get(name) is not cls]
    if unknown:
        warnings.warn(
            f"no installed plugin offers {', '.join(map(repr, unknown))}, so this adapter is saved "
            "but cannot be loaded. List the plugin in its pyproject.toml and pip install it.",
            stacklevel=3,
        )


def _describe(report: Any, plain: bool) -> dict[str, Any]:
    methods = [m.plain() if plain else m for m in report.methods]
    return {
        "name": report.name,
        "methods": [{"name": m.name, "options": m.options()} for m in methods],
        "sites": [_shape(site) for site in report.sites],
        "modules": [i.path for i in report.inserted],
    }


def _method(saved: dict[str, Any], folder: Any) -> Method:
    try:
        return method(saved["name"], **saved["options"])
    except MethodError as error:
        raise StoreError(
            f"the adapter in {folder} cannot be loaded here: {error} Install the plugin that it "
            "was made with, in that version."
        ) from error


def _shape(site: Site) -> dict[str, Any]:
    numbers = ("width", "heads", "kv_heads", "head_width", "value_width")
    return {"path": site.path, "key": site.key, "kind": site.kind} | {
        n: getattr(site, n) for n in numbers
    }


def _match(saved: dict[str, Any], sites: Sites, folder: Any) -> tuple[dict[str, Any], Sites]:
    """The sites of this model that a saved splice was made at."""
    known = {(s.path, s.key, s.kind): s for s in [*sites, *sites.others]}
    chosen: list[Site] = []
    wrong: list[str] = []
    for shape in saved["sites"]:
        site = known.get((shape["path"], shape["key"], shape["kind"]))
        if site is None:
            wrong.append(f"{shape['path']}: no such {shape['kind']} site")
            continue
        own = _shape(site)
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
    own = dict(model.named_parameters())
    for key, tensor in tensors.items():
        name = key.removeprefix("kept.")
        if key.startswith("kept.") and (name not in own or own[name].shape != tensor.shape):
            here = tuple(own[name].shape) if name in own else "not there"
            raise StoreError(_misfit(folder, name, tuple(tensor.shape), here))


def _check_rows(
    model: nn.Module, tensors: dict[str, Tensor], rows: dict[str, list[int]], folder: Any
) -> None:
    for name, chosen in rows.items():
        if not fits(model, name, chosen, tensors[f"rows.{name}"]):
            raise StoreError(
                f"the adapter in {folder} has rows {chosen[:5]} of {name}, which this model has "
                "not. Where they are new tokens, add them first: take the tokenizer that was saved "
                "with it and call model.resize_token_embeddings(len(tokenizer))."
            )


def _fill(
    model: nn.Module, tensors: dict[str, Tensor], rows: dict[str, list[int]], folder: Any,
    names: list[str],
) -> None:  # fmt: skip
    """Copy saved tensors into the splices of these names, and into the base."""
    own: dict[str, Tensor] = dict(model.named_parameters())
    wanted: dict[str, Tensor] = {f"inserted.{n}": t for n, t in full_state(model, names).items()}
    wanted |= {k: own[k.removeprefix("kept.")] for k in tensors if k.startswith("kept.")}
    wanted |= {f"rows.{name}": own[name].detach()[chosen] for name, chosen in rows.items()}
    missing, unexpected = sorted(wanted.keys() - tensors), sorted(tensors.keys() - wanted)
    if missing or unexpected:
        raise StoreError(
            f"the adapter in {folder} lacks {missing[:5]} and has unexpected {unexpected[:5]}."
        )
    for key, target in wanted.items():
        if target.shape != tensors[key].shape:
            raise StoreError(_misfit(folder, key, tuple(tensors[key].shape), tuple(target.shape)))
    with torch.no_grad():
        for key, target in wanted.items():
            target.copy_(tensors[key])
        for name, chosen in rows.items():
            own[name][chosen] = tensors[f"rows.{name}"].to(own[name])


def _misfit(folder: Any, what: str, saved: Any, here: Any) -> str:
    return (
        f"the adapter in {folder} does not fit this model: {what}: {saved} in the adapter, {here} "
        "here. Load it into the base that it was made for (see 'base' in surgery.json)."
    )


def _version() -> str:
    from surgery import __version__

    return __version__
