"""Damaged and hostile adapters: 5,200 mutations are a StoreError with nothing changed, or loaded.

The mutations know the formats: bytes, the tree of the description, the header and the tensors of
safetensors, with the digest made right again. Seeds are fixed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import random
import resource
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import surgery
from surgery.adapter import loading
from tests.support.models import build, inputs, logits, perturb
from tests.support.splices import untouched

Random = random.Random
EMBEDDING = "transformer.wte.weight"
ADAPTERS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "lora": [("lora", {"rank": 2, "ranks": {"h.0": 3}})],
    "prefix": [("prefix", {"length": 2, "gate": True})],
    "prompt": [("prompt", {"length": 2})],
    "three": [("inducer", {"key_rank": 1}), ("ffn_adapter", {"rank": 2}), ("ia3", {})],
}
VALUES: list[Any] = [
    None, True, -1, 0, 1, 3, 2**31, 10**18, 10**30, 1e308, 1e-9, float("nan"), float("inf"), 2.5,
    "", "x", "x" * 5000, "\\ud800", "\\0", "../x", "/dev/zero", "surgery.json", "(.*.*)*x",
    ".*" * 40, EMBEDDING, "transformer.h.0.attn", "default", "lora", "prompt", [], {}, [1], ["x"],
    {"x": 1}, [[[[[[1]]]]]], list(range(1000)), {str(i): i for i in range(1000)},
]  # fmt: skip
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64"]


def bytes_of(rng: Random, data: bytes) -> bytes:
    """Flip, insert, delete, cut or repeat bytes."""
    new = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at, what = rng.randrange(len(new) + 1), rng.randrange(5)
        if what == 0 and at < len(new):
            new[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            new[at:at] = rng.randbytes(rng.choice([1, 2, 50]))
        elif what == 2:
            del new[at : at + rng.choice([1, 2, 50])]
        elif what == 3:
            del new[at + 1 :]
        else:
            new[at:at] = new[max(0, at - 40) : at]
    return bytes(new)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every container in a tree, with each of its keys."""
    keys = (
        list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
    )
    return [(tree, k) for k in keys] + [pair for k in keys for pair in places(tree[k])]


def tree_of(rng: Random, tree: dict[str, Any]) -> None:
    """Replace, delete, move, rename or repeat a part of a tree of JSON."""
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        found = places(tree)
        if not found:
            return
        (holder, key), (_, other) = rng.choice(found), rng.choice(found)
        what = rng.randrange(6)
        if what <= 2:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif what == 3:
            del holder[key]
        elif what == 4 and isinstance(holder, dict):
            holder[str(other)] = holder.pop(key)
        elif isinstance(holder, list) and len(holder) < 1000:
            holder.extend(copy.deepcopy(holder) * rng.choice([1, 1, 50]))


def options_of(rng: Random, description: dict[str, Any]) -> None:
    """Give a saved method another option or another value of one."""
    method = rng.choice(rng.choice(description["splices"])["methods"])
    known = list(method["options"]) or ["rank"]
    method["options"][rng.choice([*known, "rank", "ports", "hidden"])] = rng.choice(VALUES)


def base_of(rng: Random, description: dict[str, Any], header: dict[str, Any], data: bytes) -> bytes:
    """Let the adapter bring another tensor of the base, or rows of one."""
    model = build("gpt2")
    name = rng.choice([n for n, _ in model.named_parameters()])
    own = model.get_parameter(name)
    value = rng.choice([own * 0, own * 2, own + torch.nan, own[:1], own.int()]).detach()
    if rng.random() < 0.5:
        description["kept"].append(name)
        key = f"kept.{name}"
    else:
        description["rows"][name] = rng.choice([[0], [0, 1], [-1], [10**9], [True], ["x"], []])
        key, value = f"rows.{name}", value[: len(description["rows"][name])]
    raw = value.contiguous().numpy().tobytes()
    dtype = "I32" if value.dtype == torch.int32 else "F32"
    span = [len(data), len(data) + len(raw)]
    header[key] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": span}
    return data + raw


def header_of(rng: Random, header: dict[str, Any]) -> None:
    """Change the dtype, shape, offsets or name of a tensor, or any part of the header."""
    name = rng.choice(list(header))
    entry, what = header[name], rng.randrange(6)
    if what == 0:
        entry["dtype"] = rng.choice(DTYPES)
    elif what == 1:
        entry["shape"] = rng.choice(
            [[], [0], [0, 2**62], [2**40, 2**40], entry["shape"][::-1], [-1]]
        )
    elif what == 2:
        entry["data_offsets"] = rng.choice([[0, 0], [8, 4], [0, 2**63], [-4, 4], []])
    elif what == 3:
        header[rng.choice(["x", "", "inserted.x", f"kept.{EMBEDDING}", "x" * 500])] = header.pop(
            name
        )
    elif what == 4:
        header["__metadata__"] = rng.choice([{"a": "b"}, {"a": 1}, 3])
    else:
        tree_of(rng, header)


def values_of(rng: Random, header: dict[str, Any], data: bytes) -> bytes:
    """Write other values into a tensor; some are NaN or infinity."""
    start, end = rng.choice(list(header.values()))["data_offsets"]
    one = struct.pack("<f", rng.choice([float("nan"), float("inf"), -float("inf"), 1e38]))
    return data[:start] + one * ((end - start) // 4) + data[end:]


def mutate(rng: Random, text: bytes, data: bytes) -> tuple[bytes, bytes]:
    """Return another description and other tensors; the digest is mostly right."""
    kind = rng.choice(
        ["text", "bytes", "tree", "options", "header", "header bytes", "values", "base"]
    )
    if kind == "text":
        return bytes_of(rng, text), data
    description, size = json.loads(text), struct.unpack("<Q", data[:8])[0]
    header, payload = json.loads(data[8 : 8 + size]), data[8 + size :]
    header.pop("__metadata__", None)
    if kind == "tree":
        tree_of(rng, description)
    elif kind == "options":
        options_of(rng, description)
    elif kind == "header":
        header_of(rng, header)
    elif kind == "values":
        payload = values_of(rng, header, payload)
    elif kind == "base":
        payload = base_of(rng, description, header, payload)
    if kind in ("header", "values", "base"):
        raw = json.dumps(header).encode()
        data = struct.pack("<Q", len(raw)) + raw + payload
    elif kind in ("bytes", "header bytes"):
        cut = len(data) if kind == "bytes" else 8 + size
        data = bytes_of(rng, data[:cut]) + data[cut:]
    if kind != "tree" and rng.random() < 0.95:
        description["sha256"] = hashlib.sha256(data).hexdigest()
    return json.dumps(description).encode(), data


def same(model: Any, state: dict[str, Tensor]) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[n], x) for n, x in state.items())


class Enough(BaseException):
    """Raised in place of a splice, once enough mutated adapters have been spliced in."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_mutated_adapter_is_refused_with_nothing_changed_or_loaded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("gpt2")
    surgery.splice(model, [surgery.method(n, **options) for n, options in ADAPTERS[name]])
    surgery.freeze_base(model, keep=["transformer.ln_f"])
    surgery.train_rows(model, EMBEDDING, [2, 5])
    perturb(model)
    folder = surgery.save(model, tmp_path)
    (path,) = folder.glob("*.safetensors")
    text, data = (folder / "surgery.json").read_bytes(), path.read_bytes()
    base = build("gpt2")
    state = copy.deepcopy(base.state_dict())
    sites, loaded = surgery.locate(base), 0  # found once: that takes longer than the rest

    def splice(*given: Any, **options: Any) -> Any:
        if loaded >= 40:
            raise Enough
        return surgery.splice(*given, **options)

    monkeypatch.setattr(loading, "locate", lambda model, given: sites)
    monkeypatch.setattr(loading, "splice", splice)
    monkeypatch.setattr(logging.getLogger("surgery"), "disabled", True)
    warnings.simplefilter("ignore")
    rng, refused = Random(name), 0
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(1300):
        new_text, new_data = mutate(rng, text, data)
        (folder / "surgery.json").write_bytes(new_text)
        path.write_bytes(new_data)
        try:
            surgery.load(base, folder)
        except (surgery.StoreError, Enough) as error:
            refused += len(str(error)) < 5000
            assert untouched(base)
        else:
            loaded += 1
            assert logits(base, inputs("gpt2")).shape == (2, 7, 60)
            surgery.remove(base)
            base.load_state_dict(state)
        assert same(base, state)
    assert (loaded, refused) == (40, 1260)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200 << 10  # kB


@pytest.mark.parametrize(
    "share",
    [10**400, 10**300, 1e308, float("nan"), True, "1", [1], None, -(10**7)],
    ids=[f"share{i}" for i in range(9)],
)
def test_how_far_a_splice_is_on_is_a_bounded_number(
    share: Any, saved: Path, tmp_path: Path
) -> None:
    file = saved / "surgery.json"
    found = json.loads(file.read_text())
    found["in_use"] = dict.fromkeys(found["in_use"], share)
    file.write_text(json.dumps(found))
    with pytest.raises(surgery.StoreError, match=r"in_use|damaged"):
        surgery.load(build("roberta"), saved)
