"""Sum up the rows of check.py as a line each and as a Markdown table."""

from __future__ import annotations

import re
from collections import defaultdict
from importlib.metadata import version
from typing import Any

METHODS = ("lora", "ia3", "bitfit", "inducer", "prefix")
PACKAGES = {"open_clip": "open_clip_torch"}

HEAD = """# Coverage beyond transformers

Written by `make zoo-libraries`: the smallest model of each of timm's modules that have modules of
attention, every transformer, UNet and ControlNet of diffusers as a tiny configuration, and tiny
models of torchvision and open_clip. Nothing is written down per architecture in `surgery/`.

**modules**: modules whose class is named after attention and that the example runs, and how many of
them compute a softmax; a count that the library does not see. **projections**: linear layers and
1x1 convolutions below them; how many make a port of an attention or FFN site. The others are linear
sites or named in `overlooked`; *silent* ones are neither. **lora** (all ports), **ia3**,
**bitfit**, **inducer**, **prefix**: spliced at all sites that they suit, outputs equal to the
base's at the start where the method declares it, moved parameters change the output, and `remove`
gives the base's bits and keys again. *refused*: with the reason, before anything has changed.
"""


def state(answer: Any) -> str:
    """The word for an answer of one method."""
    if answer == "ok":
        return "ok"
    known = ("SiteError", "PortError", "MethodError")
    return "refused" if isinstance(answer, dict) and answer["error"] in known else "no"


def summary(row: dict[str, Any]) -> str:
    """One line for the screen."""
    at = f"{row['library']}:{row['model']}"
    if "crash" in row:
        return f"{at}: {row['crash']['error']} {row['crash']['message'][:120]}"
    words = " ".join(f"{m} {state(row[m])}" for m in METHODS)
    silent = f", silent {len(row['silent'])}" if row["silent"] else ""
    return f"{at}: {row['reached']} of {row['projections']} projections{silent}; {words}"


def markdown(rows: list[dict[str, Any]]) -> str:
    """The tables of all libraries."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["library"]].append(row)
    lines = [HEAD]
    for library, these in groups.items():
        lines += ["", f"## {library} {version(PACKAGES.get(library, library))}", ""]
        lines += [*_totals(these), "", _row("model", "modules", "sites", "projections", *METHODS,
                                            "where not: why"), "|---" * 10 + "|"]  # fmt: skip
        lines += map(_line, these)
    return "\n".join(lines) + "\n"


def _totals(rows: list[dict[str, Any]]) -> list[str]:
    """How many families with a softmax attention take each method."""
    families = [row for row in rows if "crash" in row or row["softmax"]]
    count = max(len(families), 1)
    whole = [r for r in families if "crash" not in r and not r["silent"] and r["lora"] == "ok"]
    lines = [
        f"- {len(rows)} models, {len(families)} with a softmax in a module of attention.",
        f"- LoRA, with every projection reached or named: **{len(whole)}** "
        f"({100 * len(whole) / count:.1f} %).",
    ]
    renamed = [state(r.get("renamed")) for r in families]
    lines.append(
        f"- The same sites when every submodule has another name: **{renamed.count('ok')}**."
    )
    for method in METHODS[1:]:
        answers = [state(r.get(method)) for r in families]
        lines.append(
            f"- {method}: **{answers.count('ok')}** ({100 * answers.count('ok') / count:.1f} %), "
            f"refused with a reason {answers.count('refused')}, other {answers.count('no')}."
        )
    return lines


def _line(row: dict[str, Any]) -> str:
    if "crash" in row:
        return _row(row["model"], *["."] * 8, _plain(row["crash"]["message"]))
    why: dict[str, None] = {}
    for method in METHODS:
        answer = row[method]
        if isinstance(answer, dict):
            reason = re.search(r"; (no lse: [^;.]*|there is no attention site|it needs [^;.]*)",
                               answer["message"])  # fmt: skip
            why[_plain(reason[1] if reason else answer["message"])] = None
    if row["renamed"] != "ok":
        why[f"renamed: {_plain(row['renamed']['message'])}"] = None
    if row["silent"]:
        why[f"silent: {row['silent'][0]}"] = None
    projections = f"{row['reached']} of {row['projections']}"
    sites = f"{row['attention']} + {row['ffn']} (+ {row['linear']})"
    modules = f"{row['modules']} ({row['softmax']})"
    words = [state(row[m]) for m in METHODS]
    return _row(row["model"], modules, sites, projections, *words, "; ".join(why))


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "/").replace("<", "").replace(">", "")[:120]
