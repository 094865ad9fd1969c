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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import nn

from surgery.adapter.files import FORMAT, JSON, file_of, write_whole
from surgery.adapter.fingerprint import fingerprint
from surgery.adapter.parameters import full_state, plain_state, spliced_parameters
from surgery.adapter.row_training import trained_rows
from surgery.adapter.training import (
    kept_parameters,
)
from surgery.errors import SpliceError
from surgery.interop import huggingface
from surgery.plugin import Site, methods
from surgery.splicer import reports


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
    if not reports(model):
        raise SpliceError(f"nothing is spliced into this {type(model).__name__}: nothing to save.")
    merged = [report.name for report in reports(model).values() if report.merged]
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
        "versions": {"surgery": version("surgery"), "torch": str(torch.__version__)},
        "base": {
            "class": type(model).__name__,
            "name": huggingface.name_or_path(model),
            "fingerprint": fingerprint(model, _trained(model)),
        },
        "kept": kept_parameters(model),
        "rows": trained_rows(model),
        "splices": [_describe(report, plain) for report in reports(model).values()],
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


def _trained(model: nn.Module) -> set[str]:
    """Parameters that are no part of the base as it was: inserted, or trained along."""
    inserted = {id(parameter) for _, parameter in spliced_parameters(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in inserted}
    return names | set(kept_parameters(model)) | set(trained_rows(model))


def _warn_of_methods_not_offered(model: nn.Module) -> None:
    used = {m.name: type(m) for report in reports(model).values() for m in report.methods}
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
        "sites": [site_shape(site) for site in report.sites],
        "modules": [i.path for i in report.inserted],
    }


def site_shape(site: Site) -> dict[str, Any]:
    numbers = ("width", "heads", "kv_heads", "head_width", "value_width")
    return {"path": site.path, "key": site.key, "kind": site.kind} | {
        n: getattr(site, n) for n in numbers
    }
