"""Read the two files of an adapter that PEFT has saved, checked before anything in them is used.

    adapter_config.json          a flat dict; ``peft_type`` names the method
    adapter_model.safetensors    or adapter_model.bin, of which tensors alone are unpickled

The names in adapters' own format are adapter_config.json, without ``peft_type``, and
adapter.safetensors or pytorch_adapter.bin.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from surgery.errors import StoreError, shown
from surgery.formats.foreign import LONGEST, Foreign
from surgery.formats.pickles import require_tensors_alone
from surgery.formats.plain_files import contents

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_LARGEST = 4 << 20  # bytes of a config; the targets of 10,000 modules by path have 1 MB
PICKLED = "adapter_model.bin"
_FILES = (TENSORS, PICKLED, "adapter.safetensors", "pytorch_adapter.bin")


def read_foreign(folder: str | os.PathLike[str], at_most: int | None = None) -> Foreign | None:
    """Return the adapter of another library in a folder, None if there is none.

    Args:
        folder: the folder.
        at_most: how many bytes the file of the tensors may have; None sets no bound.

    Raises:
        StoreError: a file is missing, damaged, too large or not a plain file.
    """
    here = Path(folder)
    if (here / "surgery.json").exists():
        return None
    text = contents(here / CONFIG, _LARGEST)
    if text is None:
        return None
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{here / CONFIG} is damaged ({shown(error)}).") from error
    if not isinstance(config, dict):
        raise StoreError(f"{here / CONFIG} is damaged: it holds {shown(config)}, no dict.")
    names = _FILES[:2] if "peft_type" in config else _FILES[2:]
    for name in names:
        data = contents(here / name, at_most)
        if data is not None:
            return Foreign(str(folder), config, tensors_in(data, here / name))
    raise StoreError(f"{folder} has {CONFIG} but neither {' nor '.join(names)}. Copy them all.")


def tensors_in(data: bytes, path: Path) -> dict[str, Tensor]:
    """Return the tensors in the bytes of a file, which may be of safetensors or of torch.save.

    Raises:
        StoreError: it is damaged, holds something else than a flat dict of tensors, or would take
            more memory than it has bytes.
    """
    try:
        found: Any = load_tensors(data) if path.suffix == ".safetensors" else _unpickled(data)
    except StoreError as error:
        raise StoreError(f"{path}: {error}") from error
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise StoreError(f"{path} is damaged ({shown(error)}).") from error
    except Exception as error:  # of the unpickler, which lets stray errors out
        raise StoreError(
            f"{path} is damaged, or holds something else than tensors ({shown(error)}). Nothing "
            "in it was run. Save the adapter as safetensors."
        ) from error
    if not isinstance(found, dict) or not all(map(_is_entry, found.items())):
        raise StoreError(f"{path} holds {shown(found)}, where a flat dict of tensors must stand.")
    size = sum(x.numel() * x.element_size() for x in found.values())
    if size > len(data):
        raise StoreError(f"{path} has {len(data):,} bytes and asks for {size:,} bytes of tensors.")
    return {name: tensor.detach() for name, tensor in sorted(found.items())}


def _is_entry(item: tuple[Any, Any]) -> bool:
    name, tensor = item
    dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta
    return dense and isinstance(name, str) and 0 < len(name) <= LONGEST


def _unpickled(data: bytes) -> Any:
    """Return what torch.save has written; the file may not ask for more than its bytes."""
    require_tensors_alone(data)
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
