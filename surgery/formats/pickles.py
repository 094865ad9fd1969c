"""Look through a pickle of tensors before anything reads it.

torch.load with ``weights_only`` runs no code of a file, but it makes what the file asks for: a
``bytearray`` of any size, say. torch.save writes a dict of tensors with the few names that are
listed here, so any other name is refused by its opcode, before it is looked up.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Iterator
from typing import IO

import torch

from surgery.errors import StoreError, shown

_NEEDED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
}
_OTHER = ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4")  # torch.save writes none of them
_LARGEST = 32 << 20  # bytes of a pickle; 100,000 tensors with long names have about 25 MB
_ZIP, _END = b"PK\x03\x04", b"PK\x05\x06"
_PARTS = 5  # of a file from before torch 1.6: magic number, version, sizes, the dict, the storages


def require_tensors_alone(data: bytes) -> None:
    """Raise if what torch.save has written asks for anything but tensors and a dict of them.

    Raises:
        StoreError: it does, or it is packed, or its pickle is large.
        ValueError, OSError, zipfile.BadZipFile: it is damaged.
    """
    for pickle in _pickles(data):
        _require_known(pickle)


def _pickles(data: bytes) -> Iterator[IO[bytes]]:
    """Yield each pickle in the bytes of a file, as torch.load would find it."""
    if not data.startswith(_ZIP):
        stream = io.BytesIO(data)
        for _ in range(_PARTS):
            yield stream
        return
    # Readers of archives agree on the directory of one that ends with its record.
    if data[-22:-18] != _END or data[-2:] != b"\0\0":
        raise ValueError("an archive goes on behind its end")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > len(data):
            raise StoreError("a file of tensors is packed, so its size shows nothing.")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                yield io.BytesIO(archive.read(entry))


def _require_known(pickle: IO[bytes]) -> None:
    """Raise if a pickle names something else than tensors need; read it to its end."""
    start = pickle.tell()
    for code, value, _ in pickletools.genops(pickle):
        if pickle.tell() - start > _LARGEST:
            raise StoreError(f"a pickle in a file of tensors has more than {_LARGEST:,} bytes.")
        if code.name in _OTHER or (code.name == "GLOBAL" and not _is_needed(str(value))):
            raise StoreError(
                f"a file of tensors asks for {shown(value or code.name)}, which tensors do not "
                "need. Nothing in it was run. Save the adapter as safetensors."
            )


def _is_needed(name: str) -> bool:
    """Whether a tensor, or a dict of them, is written with this name, ``module name``."""
    module, _, last = name.partition(" ")
    storage = module == "torch" and last.endswith("Storage") and hasattr(torch, last)
    return name in _NEEDED or storage
