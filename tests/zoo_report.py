"""Sum up the rows of zoo_check.py: totals per check, and the failures grouped by what they say.

python tests/zoo_report.py FILE
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections import defaultdict
from typing import Any

CHECKS = ("locate", "attention", "ffn", "eval", "train", "batch1", "alive", "generate", "remove")


def failure(error: BaseException) -> dict[str, str]:
    """The type, the message, and where it happened in surgery and in the model's code."""
    places = {"surgery": "", "modeling": ""}
    link: BaseException | None = error
    while link is not None:
        for frame in traceback.extract_tb(link.__traceback__):
            short = "/".join(frame.filename.split("/")[-2:])
            if "/main/surgery/" in frame.filename:
                places["surgery"] = f"{short}:{frame.lineno} {frame.name}"
            elif "/transformers/" in frame.filename:
                places["modeling"] = f"{short}:{frame.lineno} {frame.line}"
        link = link.__cause__
    return {"error": type(error).__name__, "message": str(error)[:300], **places}


def summary(rows: list[dict[str, Any]]) -> str:
    """Totals per check and the failures grouped by what they say, the most frequent first."""
    built = [r for r in rows if r["build"] == "ok"]
    lines = [f"{len(built)} of {len(rows)} types build"]
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for implementation in ("sdpa", "eager"):
        runs = [(r["type"], r["runs"].get(implementation, {})) for r in built]
        runs = [(t, run) for t, run in runs if run and "unsupported" not in run]
        sites = [sum(run.get(k, 0) for _, run in runs) for k in ("n_attention", "n_ffn")]
        lines.append(
            f"{implementation}: {len(runs)} types, {sites[0]} attention and {sites[1]} FFN sites"
        )
        for name in CHECKS:
            answers = [(t, run[name]) for t, run in runs if name in run]
            skipped = sum("skip" in a for _, a in answers)
            wrong = [(t, a) for t, a in answers if "error" in a]
            good = len(answers) - skipped - len(wrong)
            lines.append(
                f"  {name:<10} ok {good:>4}  failed {len(wrong):>4}  left out {skipped:>4}"
            )
            for model_type, answer in wrong:
                for method, one in (answer.get("first") or {"": answer}).items():
                    groups[_category(name, method, one)].append(model_type)
    for row in built:
        if "crash" in row:
            groups[_category("crash", "", row["crash"])].append(row["type"])
    lines.append("")
    for key, types in sorted(groups.items(), key=lambda item: -len(set(item[1]))):
        names = sorted(set(types))
        lines.append(f"{len(names):>4}  {' | '.join(key)}\n        {' '.join(names[:12])}")
    return "\n".join(lines)


def _category(name: str, method: str, answer: dict[str, str]) -> tuple[str, ...]:
    said = re.sub(r"'[^']*'|\"[^\"]*\"|\d[\d.e+-]*|\S*\.\S+", "_", answer["message"])
    said = re.sub(r"(forward of|site in) \w+", r"\1 _", said)
    place = re.sub(r":\d+", "", answer.get("surgery", ""))
    return name, method, answer["error"], place, said.replace("\n", " ")[:110]


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        print(summary([json.loads(line) for line in file]))
