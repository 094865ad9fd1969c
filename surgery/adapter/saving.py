"""Save the splices of a model: a JSON file that describes them, and a file of their tensors.

    splice -> train -> save -> load      splices the same methods into a base, copies the tensors
                            -> restore   copies the tensors into a model that is spliced already

    surgery.json                    format, versions, digest of the tensors
                                    base: class, name, fingerprint of its weights
                                    splices: name, methods and options, sites, module paths
                                    in_use: how far each splice was on
                                    kept, rows: tensors of the base that were trained along
    surgery-<digest>.safetensors    inserted.<name>   of inserted modules
                                    kept.<name>       whole tensors of the base (freeze_base)
                                    rows.<name>       single rows of them (train_rows)

The tensors are written first. The JSON names them by their digest and takes its place last, in one
step (adapter/atomic_write.py), so an interrupted save leaves the old adapter whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from surgery.adapter.atomic_write import write
from surgery.adapter.claims import finite
from surgery.adapter.fingerprint import fingerprint
from surgery.adapter.manifest import FORMAT
from surgery.adapter.parameters import (
    full_state,
    kept_tensors,
    plain_state,
    spliced_parameters,
)
from surgery.adapter.peft_saving import save_peft
from surgery.adapter.row_training import trained_rows
from surgery.errors import SpliceError
from surgery.interop import (
    division_mesh,
    huggingface,
    is_first_process,
    is_in_parts,
    is_partitioned,
    joined,
    keeping_thread_state,
    onloaded,
    out_of_reach,
    wait_for_others,
    whole,
)
from surgery.plugin import Reparametrised, Site, methods
from surgery.splicer import Report, in_use, reports, require_spliced, spliced_model

Format = Literal["surgery", "peft"]


@keeping_thread_state
def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    plain: bool = True,
    only: str | Sequence[str] | None = None,
    format: Format = "surgery",
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Save the splices of a model, and the parameters of its base that were trained along.

    Args:
        model: a spliced model, or DDP, FSDP or ``torch.compile`` around it.
        folder: the folder to write to. It is made if needed; an older adapter in it is replaced.
        plain: store only what inference needs, such as the keys and values of a prefix without the
            MLP that makes them. ``False`` stores everything, to continue training.
        only: the splices to save, by name; None means all.
        format: ``surgery``, the own format, which holds everything; or ``peft``, the two files that
            PEFT, vLLM and converters to GGUF read. It holds one splice of one of the methods lora,
            ia3, prefix (with ``shift``) and prompt, with heads, biases and rows beside it.
        state_dict: whole tensors by their names in the model, as a trainer gathers those of a
            sharded model in one process. They are stored in place of the model's own.

    A model that is sharded over several processes must be saved by all of them; the first writes.
    Saves to one folder wait for each other: the last one stays, and warns if it has waited.

    Returns:
        the folder.

    Raises:
        SpliceError: nothing is spliced in, under a name in ``only``, a splice is partly merged,
            numbers are offloaded, a tensor of ``state_dict`` is a part, a splice has code that no
            file can hold, or something has no place in the format.
        StoreError: the folder cannot be written to; the adapter in it is as it was.

    Example:
        ``surgery.save(model, "adapter")``, or ``surgery.save(model, "one", only="first")``
    """
    model = spliced_model(model)
    asked = [only] if isinstance(only, str) else list(reports(model) if only is None else only)
    require_spliced(model, *asked)
    names = [name for name in reports(model) if name in asked]  # in the order in which they run
    if not names:
        raise SpliceError("only= names no splice, so there is nothing to save. None means all.")
    chosen = [reports(model)[name] for name in names]
    merged = [report.name for report in chosen if report.merged]
    if merged:
        raise SpliceError(
            f"splice {merged[0]!r} is partly merged into the base, so an adapter would lack the "
            "part that the base's weights hold. Save before merging, or save the whole model."
        )
    _require_storable(chosen)
    if format not in get_args(Format):
        raise SpliceError(f"format={format!r} must be one of {', '.join(get_args(Format))}.")
    modules = [model.get_submodule(i.path) for report in chosen for i in report.inserted]
    _require_whole(model, state_dict, modules if plain else [])
    given = state_dict or {}
    own = dict(model.named_parameters())
    trained = [own[n] for n in sorted(_trained(model)) if n in own and state_dict is None]
    divided = state_dict is None and division_mesh(model) is not None
    sharded = divided or any(map(is_in_parts, trained))
    if format == "peft":
        if any(map(is_partitioned, model.parameters())):
            raise SpliceError(
                "PEFT's format tells the shapes of the base's matrices, which ZeRO-3 has taken "
                "apart. Save in the own format, load that into a base in one process, and save it "
                "there with format='peft'."
            )
        return save_peft(model, folder, names, given, sharded)
    _warn_of_methods_not_offered(chosen)
    with onloaded(modules), joined(trained):
        inserted = plain_state(model, names) if plain else full_state(model, names)
        tensors = {f"inserted.{name}": given.get(name, t) for name, t in inserted.items()}
        tensors |= {f"kept.{name}": given.get(name, t) for name, t in kept_tensors(model).items()}
        held = {**own, **given}
        tensors |= {f"rows.{name}": held[name][rows] for name, rows in trained_rows(model).items()}
        away = [name for name, tensor in tensors.items() if tensor.is_meta]
        if away:
            raise SpliceError(f"{away[0]} holds no numbers to save. {out_of_reach(model)}")
        stored = {n: whole(t.detach()).cpu().contiguous().clone() for n, t in tensors.items()}
    _warn_of_values(stored)
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
        "splices": [_describe(report, plain) for report in chosen],
        "in_use": {name: share for name, share in in_use(model).items() if name in names},
    }
    text = json.dumps(description, indent=1, allow_nan=False).encode()
    target = Path(folder)
    try:
        replaced = (not sharded or is_first_process()) and write(target, file, data, text)
    finally:
        if sharded:
            wait_for_others()
    if replaced:
        warnings.warn(
            f"another save to {target} was under way; this one waited for it and has replaced its "
            "adapter. Give each run a folder of its own.",
            stacklevel=2,
        )
    return target


def _require_whole(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None, made_plain: Iterable[nn.Module]
) -> None:
    """Raise if a state_dict leaves a tensor in parts: one process alone would wait for the others.

    Raises:
        SpliceError: a trained tensor is sharded in it, or missing and sharded in the model; or
            what is stored is computed by one of the modules ``made_plain`` from sharded tensors.
    """
    if state_dict is None:
        return
    then = (
        "so a save would wait for all processes. Call surgery.save(model, folder) in every "
        "process, without state_dict="
    )
    own = dict(model.named_parameters())
    for name in sorted(_trained(model)):
        tensor = state_dict.get(name, own.get(name))
        if tensor is not None and is_in_parts(tensor):
            fault = "holds a part of" if name in state_dict else "lacks"
            raise SpliceError(
                f"state_dict= {fault} {name}, of which each process has a part, {then}, or pass "
                "whole tensors."
            )
    for module in made_plain:
        if isinstance(module, Reparametrised) and any(map(is_in_parts, module.parameters())):
            raise SpliceError(
                f"what inference needs of {type(module).__name__} is computed from parameters of "
                f"which each process has a part, {then}, or pass plain=False."
            )


def _warn_of_values(stored: dict[str, Tensor]) -> None:
    """Warn if ``load`` will refuse these tensors because training has diverged."""
    wrong = [name for name, x in stored.items() if name.startswith("inserted.") and not finite(x)]
    if wrong:
        warnings.warn(
            f"{wrong[0].removeprefix('inserted.')} holds NaN or infinity, so surgery.load will "
            "refuse the adapter that is saved now. Training has diverged.",
            stacklevel=3,
        )


def _trained(model: nn.Module) -> set[str]:
    """Return the names of all parameters that are inserted, or trained along."""
    inserted = {id(parameter) for _, parameter in spliced_parameters(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in inserted}
    return names | set(kept_tensors(model)) | set(trained_rows(model))


def _require_storable(chosen: Iterable[Report]) -> None:
    """Raise if a splice has what no file can hold, such as a function of the user's."""
    for report in chosen:
        why = next((m.unsaved for m in report.methods if m.unsaved), "")
        if why:
            raise SpliceError(
                f"splice {report.name!r} cannot be saved: {why}. Name the others in only=, or "
                f"surgery.remove(model, {report.name!r}) first."
            )


def _warn_of_methods_not_offered(chosen: Iterable[Report]) -> None:
    """Warn if a method comes from no installed plugin: ``load`` would not find it."""
    used = {m.name: type(m) for report in chosen for m in report.methods}
    unknown = [name for name, cls in used.items() if methods().get(name) is not cls]
    if unknown:
        warnings.warn(
            f"no installed plugin offers {', '.join(map(repr, unknown))}, so this adapter is saved "
            "but cannot be loaded. List the plugin in its pyproject.toml and pip install it.",
            stacklevel=3,
        )


def _describe(report: Report, plain: bool) -> dict[str, Any]:
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
    shape: dict[str, Any] = {"path": site.path, "key": site.key, "kind": site.kind}
    shape |= {n: getattr(site, n) for n in numbers}
    return shape | ({"picked": list(site.picked)} if site.picked else {})
