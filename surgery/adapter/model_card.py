"""Write the card of an adapter: README.md with metadata for the Hugging Face hub.

Names and options of an adapter come from whoever made it, so they are shown as code, and metadata
is written by a YAML library.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from surgery.adapter.inspection import SavedAdapter

_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)
_CARD = """---
{metadata}---

# {title}

An adapter for {base}, made with `surgery`. It holds what was trained, {numbers:,}
numbers, and not the base.

| | |
|---|---|
{rows}
{scores}
## Use it

```python
{code}```
"""


def model_card(
    saved: SavedAdapter, repository: str, subfolder: str, scores: Mapping[str, float]
) -> str:
    """Return the card of an adapter: method, sites, counts, scores, and the code to load it.

    Args:
        saved: what the adapter holds.
        repository, subfolder: where the card will stand.
        scores: results by name.
    """
    name = saved.base_name
    on_hub = name if name and _ID.fullmatch(name) and not Path(name).exists() else None
    methods = [method for splice in saved.splices for method in splice.methods]
    names = [m.partition("(")[0] for m in methods]
    tags = dict.fromkeys(["surgery", "adapter", *(n for n in names if re.fullmatch(r"\w+", n))])
    metadata: dict[str, Any] = {"base_model": on_hub} if on_hub else {}
    metadata |= {"library_name": "surgery", "tags": list(tags)}
    rows = [("base", f"{_code(saved.base)} {_code(name) if name else ''}".strip())]
    for splice in saved.splices:
        rows += [("method", _code(method)) for method in splice.methods]
        rows.append(("sites", f"{_code(splice.places)}, with {splice.modules:,} modules"))
    trained = [*saved.kept, *(f"{count} rows of {n}" for n, count in saved.rows.items())]
    if trained:
        rows.append(("trained along", ", ".join(map(_code, trained[:20]))))
    rows.append(("versions", _code(", ".join(f"{k} {v}" for k, v in saved.versions.items()))))
    return _CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False),
        title=repository.split("/")[1] + (f", {subfolder}" if subfolder else ""),
        base=f"[{on_hub}](https://huggingface.co/{on_hub})" if on_hub else _code(saved.base),
        numbers=saved.numbers,
        rows="\n".join(f"| {key} | {value} |" for key, value in rows),
        scores=_scores(scores),
        code=_loading(saved.base, on_hub, repository, subfolder),
    )


def _scores(scores: Mapping[str, float]) -> str:
    if not scores:
        return ""
    lines = [f"| {_code(str(name))} | {value:.4f} |" for name, value in scores.items()]
    return "\n".join(["", "| score | |", "|---|---|", *lines, ""])


def _loading(kind: str, base: str | None, repository: str, subfolder: str) -> str:
    """Return the lines that load a base and the adapter."""
    known = kind if re.fullmatch(r"[A-Z]\w*", kind, re.ASCII) else "AutoModel"
    more = f", subfolder={subfolder!r}" if subfolder else ""
    if base is None:
        made = ["import surgery", "", "model = ...  # the base that the adapter was made for"]
    else:
        imports = ["import surgery", f"from transformers import {known}", ""]
        made = [*imports, f"model = {known}.from_pretrained({base!r})"]
    return "\n".join([*made, f"surgery.load(model, {repository!r}{more})", ""])


def _code(text: str) -> str:
    """Return text as code in a table, on one line and of bounded length."""
    one = " ".join(text.split()).replace("`", "'").replace("|", "\\|")
    return f"`{one if len(one) <= 500 else one[:500] + '...'}`"
