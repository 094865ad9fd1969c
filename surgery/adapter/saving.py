"""Save the splices of a model: a JSON file that describes them, and a file of their tensors.

    splice -> train -> save -> load      splices the same methods into a base, copies the tensors
                            -> restore   copies the tensors into a model that is spliced already

    surgery.json                    format, versions, digest of the tensors
                                    base: class, name, fingerprint of its weights
                                    splices: name, methods and options, sites, module paths
                                    kept, rows: tensors of the base that were trained along
    surgery-<digest>.safetensors    inserted.<name>   of inserted modules
                                    kept.<name>       whole tensors of the base (freeze_base)
                                    rows.<name>       single rows of them (train_rows)

The tensors are written first. The JSON names them by their digest and takes its place last, in one
step, so an interrupted save leaves the old adapter whole.
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

from surgery.adapter.atomic_write import FORMAT, JSON, file_of, write_whole
from surgery.adapter.fingerprint import fingerprint
from surgery.adapter.parameters import full_state, plain_state, spliced_parameters
from surgery.adapter.row_training import trained_rows
from surgery.adapter.training import kept_tensors
from surgery.errors import SpliceError
from surgery.interop import (
    huggingface,
    is_first_process,
    is_sharded,
    onloaded,
    out_of_reach,
    wait_for_others,
    whole,
)
from surgery.plugin import Site, methods
from surgery.splicer import reports


def save(model: nn.Module, folder: str | os.PathLike[str], plain: bool = True) -> Path:
    """Save every splice of a model, and the parameters of its base that were trained along.

    Args:
        model: a spliced model.
        folder: the folder to write to. It is made if needed; an older adapter in it is replaced.
        plain: store only what inference needs, such as the keys and values of a prefix without the
            MLP that makes them. ``False`` stores everything, to continue training.

    A model that is sharded over several processes must be saved by all of them; the first writes.

    Returns:
        the folder.

    Raises:
        SpliceError: nothing is spliced in, a splice is partly merged, or numbers are offloaded.
    """
    if not reports(model):
        raise SpliceError(f"nothing is spliced into this {type(model).__name__}: nothing to save.")
    merged = [report.name for report in reports(model).values() if report.merged]
    if merged:
        raise SpliceError(
            f"splice {merged[0]!r} is partly merged into the base, so an adapter would lack the "
            "part that the base's weights hold. Save before merging, or save the whole model."
        )
    own = dict(model.named_parameters())
    _warn_of_methods_not_offered(model)
    modules = [model.get_submodule(i.path) for r in reports(model).values() for i in r.inserted]
    with onloaded(modules):
        inserted = plain_state(model) if plain else full_state(model)
        tensors = {f"inserted.{name}": t for name, t in inserted.items()}
        tensors |= {f"kept.{name}": tensor for name, tensor in kept_tensors(model).items()}
        tensors |= {f"rows.{name}": own[name][rows] for name, rows in trained_rows(model).items()}
        away = [name for name, tensor in tensors.items() if tensor.is_meta]
        if away:
            raise SpliceError(f"{away[0]} holds no numbers to save. {out_of_reach(model)}")
        stored = {n: whole(t.detach()).cpu().contiguous().clone() for n, t in tensors.items()}
    data = save_tensors(stored)
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
        "kept": list(kept_tensors(model)),
        "rows": trained_rows(model),
        "splices": [_describe(report, plain) for report in reports(model).values()],
    }
    text = json.dumps(description, indent=1).encode()
    target = Path(folder)
    sharded = any(map(is_sharded, tensors.values()))
    if not sharded or is_first_process():
        _write(target, file, data, text)
    if sharded:
        wait_for_others()
    return target


def _write(target: Path, file: str, data: bytes, text: bytes) -> None:
    """Write the tensors, then the description, and remove the tensors of the adapter before."""
    target.mkdir(parents=True, exist_ok=True)
    before = file_of(target)
    write_whole(target / file, data)
    write_whole(target / JSON, text)
    if before not in ("", file):  # other files may belong to a save that is under way
        (target / before).unlink(missing_ok=True)


def _trained(model: nn.Module) -> set[str]:
    """Return the names of all parameters that are inserted, or trained along."""
    inserted = {id(parameter) for _, parameter in spliced_parameters(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in inserted}
    return names | set(kept_tensors(model)) | set(trained_rows(model))


def _warn_of_methods_not_offered(model: nn.Module) -> None:
    """Warn if a method comes from no installed plugin: ``load`` would not find it."""
    used = {m.name: type(m) for report in reports(model).values() for m in report.methods}
    unknown = [name for name, cls in used.items() if methods().get(name) is not cls]
    if unknown:
        warnings.warn(
            f"no installed plugin offers {', '.join(map(repr, unknown))}, so this adapter is saved "
            "but cannot be loaded. List the plugin in its pyproject.toml and pip install it.",
            stacklevel=3,
        )


def _describe(report: Any, plain: bool) -> dict[str, Any]:
    """Return what the JSON holds of one splice."""
    methods = [m.plain() if plain else m for m in report.methods]
    return {
        "name": report.name,
        "methods": [{"name": m.name, "options": m.options()} for m in methods],
        "sites": [site_shape(site) for site in report.sites],
        "modules": [i.path for i in report.inserted],
    }


def site_shape(site: Site) -> dict[str, Any]:
    """Return the identity and the widths of a site; ``load`` compares them with the base's."""
    numbers = ("width", "heads", "kv_heads", "head_width", "value_width")
    return {"path": site.path, "key": site.key, "kind": site.kind} | {
        n: getattr(site, n) for n in numbers
    }
