"""Save a splice in the format of PEFT: adapter_config.json and adapter_model.safetensors.

The names of both files are fixed, so one rename cannot replace them together. Where the config
stays as it is, renaming the tensors is the one step. Otherwise the config goes first and comes
last: a reader in between finds no adapter, never one of two halves. An exception in between ends
with the old adapter or the new one.
"""

from __future__ import annotations

import json
import os
import secrets
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from surgery.adapter.atomic_write import locked, put, sync, unlink
from surgery.adapter.claims import finite
from surgery.adapter.parameters import kept_tensors
from surgery.adapter.row_training import trained_rows
from surgery.errors import SpliceError, StoreError
from surgery.formats import CONFIG, TENSORS, as_peft, contents
from surgery.interop import (
    is_first_process,
    onloaded,
    out_of_reach,
    wait_for_others,
    whole,
)
from surgery.splicer import reports


def save_peft(
    model: nn.Module,
    folder: str | os.PathLike[str],
    names: Sequence[str],
    given: Mapping[str, Tensor],
    sharded: bool,
) -> Path:
    """Write one splice of a model as PEFT would have saved it.

    Args:
        names: the splice; several are refused.
        given: whole tensors by their names in the model, stored in place of its own.
        sharded: whether every process has come here, with a part of the trained tensors.

    Raises:
        SpliceError: something has no place in that format, or numbers are offloaded.
        StoreError: the folder holds an adapter in the own format, or cannot be written to.
    """
    target = Path(folder)
    if (target / "surgery.json").exists():
        raise StoreError(
            f"{folder} holds an adapter in the own format, which load would find first. Choose "
            "another folder."
        )
    chosen = {name: reports(model)[name] for name in names}
    inserted = [i.path for report in chosen.values() for i in report.inserted]

    own_names = {id(p): name for name, p in model.named_parameters()}

    def gather(tensor: Tensor) -> Tensor:
        tensor = given.get(own_names.get(id(tensor), ""), tensor)
        if tensor.is_meta:
            raise SpliceError(f"a tensor holds no numbers to save. {out_of_reach(model)}")
        return whole(tensor.detach()).cpu().contiguous().clone()

    with onloaded([model.get_submodule(path) for path in inserted]), torch.no_grad():
        kept, rows = kept_tensors(model), trained_rows(model)
        config, tensors = as_peft(model, chosen, kept, rows, gather)
    wrong = [name for name, tensor in tensors.items() if not finite(tensor)]
    if wrong:
        warnings.warn(f"{wrong[0]} holds NaN or infinity. Training has diverged.", stacklevel=3)
    data = save_tensors({n: x.contiguous() for n, x in tensors.items()}, {"format": "pt"})
    text = json.dumps(config, indent=2, allow_nan=False).encode()
    try:
        if not sharded or is_first_process():
            _write(target, text, data)
    finally:
        if sharded:
            wait_for_others()
    return target


def _write(folder: Path, text: bytes, data: bytes) -> None:
    """Replace both files, or leave both as they were.

    Raises:
        StoreError: another save does not end, or a file cannot be written.
    """
    staged = [folder / f".surgery-{secrets.token_hex(8)}.tmp" for _ in range(3)]
    config = folder / CONFIG
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            before = contents(config)
            try:
                put(staged[0], text)
                put(staged[1], data)
                if before is not None and before != text:
                    os.replace(config, staged[2])
                os.replace(staged[1], folder / TENSORS)
                sync(folder)
                os.replace(staged[0], config)
                sync(folder)
            finally:
                if staged[2].exists() and not config.exists():  # one half is done: back, or on
                    os.replace(staged[2 if staged[1].exists() else 0], config)
                for path in staged:
                    unlink(path)
    except OSError as error:
        raise StoreError(
            f"{error.filename or folder} cannot be written ({error.strerror or error}). Make room, "
            "or choose a folder that you may write to."
        ) from error
