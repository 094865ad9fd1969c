"""adapter_model.bin: tensors alone are read, and nothing is made that the file does not hold."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from tests.support.models import build, inputs, logits
from tests.support.peft_folders import Q, folder, refused, tensors

A = f"{Q}.lora_A.weight"


class Runs:
    """Its unpickling would run code."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("code of a file was run",))


def test_a_pickle_runs_no_code_and_unpacks_to_no_more_than_it_has(tmp_path: Path) -> None:
    path = folder(tmp_path) / "adapter_model.bin"
    expected = tensors()
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(expected, path)
    model, same = build("gpt2"), build("gpt2")
    surgery.load(model, tmp_path)
    surgery.load(same, folder(tmp_path / "other"))
    assert torch.equal(logits(model, inputs("gpt2")), logits(same, inputs("gpt2")))

    torch.save({"x": Runs()}, path)
    refused(tmp_path, "asks for '_pytest.outcomes .*Nothing in it was run")
    for protocol in range(5):
        path.write_bytes(pickle.dumps(Runs(), protocol))
        refused(tmp_path, "Nothing in it was run")
    torch.save({A: torch.ones(1).expand(10**12)}, path)
    refused(tmp_path, "asks for")
    torch.save({A: torch.zeros(2**20)}, tmp_path / "zeros")
    with zipfile.ZipFile(tmp_path / "zeros") as plain, zipfile.ZipFile(path, "w") as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
    refused(tmp_path, "packed")
    torch.save([1, 2], path)
    refused(tmp_path, "a flat dict of tensors")


class Sized:
    """Its unpickling would take a gigabyte."""

    def __reduce__(self) -> Any:
        return (bytearray, (1 << 30,))


def test_what_asks_for_memory_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder(tmp_path) / "adapter_model.bin"
    (tmp_path / "adapter_model.safetensors").unlink()
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("it was read"))
    for new in (True, False):
        torch.save({"x": Sized()}, path, _use_new_zipfile_serialization=new)
        refused(tmp_path, "asks for .*bytearray")
    path.write_bytes(pickle.dumps(0, 2) + pickle.dumps(Sized(), 2))  # in any part of it
    refused(tmp_path, "asks for .*bytearray")
    torch.save(tensors(), path)
    path.write_bytes(path.read_bytes() + b"PK")
    refused(tmp_path, "goes on behind its end")
    monkeypatch.setattr("surgery.formats.pickles._LARGEST", 100)
    torch.save(tensors(), path)
    refused(tmp_path, "has more than 100 bytes")


@pytest.mark.parametrize("new", [True, False])
def test_dtypes_and_parameters_of_a_pickle_are_read(new: bool, tmp_path: Path) -> None:
    path = folder(tmp_path) / "adapter_model.bin"
    (tmp_path / "adapter_model.safetensors").unlink()
    kinds = [torch.bfloat16, torch.float16, torch.float64, torch.float32]
    parts = zip(tensors().items(), kinds, strict=True)
    found = {key: torch.nn.Parameter(x.to(kind)) for (key, x), kind in parts}
    torch.save(found, path, _use_new_zipfile_serialization=new)
    model = surgery.load(build("gpt2"), tmp_path)
    same = surgery.load(build("gpt2"), folder(tmp_path / "b", found=dict(found)))
    assert torch.equal(logits(model, inputs("gpt2")), logits(same, inputs("gpt2")))
