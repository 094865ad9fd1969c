"""Check surgery.json, the description of a saved adapter, before anything in it is used.

    parse    bytes -> the description: JSON of format 1, each value of the right type and size

A description comes from strangers. Names are bounded, numbers are finite, and a file is named by
its bare name, so nothing in it can lead out of its folder. What the values claim of the base and
the tensors is compared later (adapter/claims.py). adapter/saving.py has the format.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from surgery.errors import StoreError, shown
from surgery.splicer import is_name

FORMAT = 1
JSON = "surgery.json"
LARGEST = 32 << 20  # bytes; the description of 36,000 sites has about 13 MB

_SITE_NAMES = ("path", "key", "kind")
_SITE_WIDTHS = ("width", "heads", "kv_heads", "head_width", "value_width")

Check = Callable[[Any], bool]


def parse(data: bytes, path: Path) -> dict[str, Any]:
    """Return the description in the bytes of a surgery.json.

    Raises:
        StoreError: it is no JSON, of another format, or a value has the wrong type or size.
    """
    try:
        found = json.loads(data)
        written = found["format"]
        if written != FORMAT or type(written) is not int:
            versions = found.get("versions")
            by = versions.get("surgery") if isinstance(versions, dict) else None
            raise StoreError(
                f"{path} has format {shown(written)}, this surgery reads {FORMAT}. Install the "
                f"version {shown(by)} that wrote it."
            )
        found.setdefault("rows", {})  # early files have none
        found.setdefault("in_use", {})
        wrong = next(_wrong(found), None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"{path} is damaged ({shown(error)}). Save the adapter again.") from error
    if wrong is not None:
        raise StoreError(
            f"{path} is damaged: {wrong} is missing, or has a wrong type or size. Save the adapter "
            "again."
        )
    return found  # type: ignore[no-any-return]


def is_name_of(file: Any, digest: Any) -> bool:
    """Whether ``surgery.save`` gives a file of tensors with this digest this name."""
    return isinstance(digest, str) and file == f"surgery-{digest[:12]}.safetensors"


def _wrong(d: dict[str, Any]) -> Iterator[str]:
    """Yield the names of the parts of a description that are not as they must be.

    Raises:
        KeyError, TypeError, AttributeError: a part is missing, or a container has another type.
    """
    base, rows, splices = d["base"], d["rows"], d["splices"]
    yield from _named("tensors", _is_file(d["tensors"]))
    yield from _named("sha256", isinstance(d["sha256"], str) and len(d["sha256"]) == 64)
    yield from _named("base", isinstance(base, dict) and _is_fingerprint(base["fingerprint"]))
    yield from _named("kept", _all_new(d["kept"], _is_text))
    yield from _named("rows", all(_is_text(n) and _all_new(r, _is_count) for n, r in rows.items()))
    yield from _named("rows", all(rows.values()) and not rows.keys() & set(d["kept"]))
    yield from _named("splices", isinstance(splices, list) and len(splices) > 0)
    names = [splice["name"] for splice in splices]
    yield from _named("name", _all_new(names, is_name))
    shares = d["in_use"]
    yield from _named("in_use", shares.keys() <= {*names} and all(map(_is_share, shares.values())))
    for splice in splices:
        methods = splice["methods"]
        yield from _named("modules", _all_new(splice["modules"], _is_text))
        yield from _named("methods", isinstance(methods, list) and all(map(_is_method, methods)))
        yield from _named("sites", isinstance(splice["sites"], list) and _are_sites(splice))


def _named(name: str, fits: bool) -> list[str]:
    return [] if fits else [name]


def _is_text(value: Any, longest: int = 1000) -> bool:
    return isinstance(value, str) and 0 < len(value) <= longest


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e6


def _is_file(value: Any) -> bool:
    """Whether this is the bare name of a file."""
    return isinstance(value, str) and bool(re.fullmatch(r"\w[\w.-]{0,200}", value, re.ASCII))


def _all_new(values: Any, check: Check) -> bool:
    """Whether this is a list whose items pass a check and differ."""
    return isinstance(values, list) and all(map(check, values)) and len({*values}) == len(values)


def _is_fingerprint(value: Any) -> bool:
    """Whether these are numbers <s, W> / |W|, which are at most |s| = 256; see fingerprint.py."""
    if isinstance(value, str):  # early files have a digest of shapes here
        return _is_text(value)
    numbers = [x for x in value.values() if isinstance(x, (int, float)) and abs(x) <= 257]
    return len(numbers) == len(value)


def _is_method(value: Any) -> bool:
    options = value["options"]
    return _is_text(value["name"], 100) and isinstance(options, dict) and _is_plain(options)


def _is_plain(value: Any, depth: int = 4) -> bool:
    """Whether an option is bounded plain data: short texts, finite numbers, small containers."""
    if isinstance(value, (list, dict)):
        items = [*value, *value.values()] if isinstance(value, dict) else value
        fits = depth > 0 and len(value) <= (10_000 if isinstance(value, dict) else 1000)
        return fits and all(_is_plain(item, depth - 1) for item in items)
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return len(value) <= 1000
    return value is None or isinstance(value, int)


def _are_sites(splice: dict[str, Any]) -> bool:
    """Whether a splice names its sites by path, key and kind, each once, with their widths."""
    sites = splice["sites"]
    texts = [[site[part] for part in _SITE_NAMES] for site in sites]
    picked = [site.get("picked", []) for site in sites]
    known = {*_SITE_NAMES, "picked"}
    widths = [n for site in sites for part, n in site.items() if part not in known]
    return (
        all(isinstance(text, str) and len(text) <= 1000 for each in texts for text in each)
        and len({tuple(each) for each in texts}) == len(texts)
        and all(map(_is_count, widths))
        and all(_all_new(ports, _is_text) for ports in picked)
        and all(site.keys() <= {*known, *_SITE_WIDTHS} for site in sites)
    )
