"""Sum up the rows of check.py: totals, failures grouped by what they say, and the table.

python -m tests.zoo.report FILE... [--table docs/coverage.md]
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import surgery

CHECKS = ("locate", "attention", "ffn", "eval", "train", "batch1", "alive", "generate", "remove")

LIBRARY = str(Path(surgery.__file__).parent)


def failure(error: BaseException) -> dict[str, str]:
    """The type, the message, and where it happened in surgery and in the model's code."""
    places = {"surgery": "", "modeling": ""}
    link: BaseException | None = error
    while link is not None:
        for frame in traceback.extract_tb(link.__traceback__):
            short = "/".join(frame.filename.split("/")[-2:])
            if frame.filename.startswith(LIBRARY):
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


HEAD = """# Coverage

Written by `make zoo`, with transformers {transformers} and torch {torch}: every model type that
transformers lists and that can be shrunk generically, as a tiny random model. Nothing is written
down per architecture, neither in `surgery/` nor in the zoo.

**found**: attention + FFN (+ linear) sites. **splice**: inducer and LoRA at every attention site;
`lora` where the logsumexp cannot be had, so that inducer is refused with the reason. **start**:
outputs equal to the base's bit for bit, in evaluation, in training, and for a batch of one.
**alive**: moved parameters change the output at every site; `no` names sites whose result the model
itself throws away (the last layer of a tower, where an earlier one is read). **generate**: the same
greedy tokens. **remove**: the base's bits and keys again. A dot: that check does not apply (no text
generator; a base that draws at random). Each with `sdpa` and with `eager` attention where the type
has both.
"""


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of all types, with totals, as Markdown."""
    built = [r for r in rows if r["build"] == "ok"]
    judged = [_judge(row) for row in built]
    attention = [j for j in judged if j["attention"] or "timed" in j]
    good = [j for j in attention if j["splice"] in ("ok", "lora")]
    exact = [j for j in good if all(j[c] in ("ok", ".") for c in ("start", "generate", "remove"))]
    lines = [HEAD.format(transformers=version("transformers"), torch=version("torch"))]
    lines += [
        f"- {len(rows)} types, {len(built)} built; {len(attention)} of them with attention.",
        f"- Located and spliced: **{len(good)} of {len(attention)}** "
        f"({100 * len(good) / max(len(attention), 1):.1f} %); with inducer, too: "
        f"{sum(j['splice'] == 'ok' for j in good)}.",
        f"- Of these, start, generate and remove exact: **{len(exact)}**.",
        f"- Without attention, said so, with what there is instead: {len(built) - len(attention)}.",
        "",
        "| type | found | splice | start | alive | generate | remove | where not: why |",
        "|---|---|---|---|---|---|---|---|",
    ]
    columns = ("type", "found", "splice", "start", "alive", "generate", "remove", "why")
    lines += ["| " + " | ".join(j[c] for c in columns) + " |" for j in judged]
    lines += ["", "## Not built", "", "| type | why the tiny model does not run |", "|---|---|"]
    lines += [f"| {r['type']} | {_plain(r['build'])[:110]} |" for r in rows if r["build"] != "ok"]
    return "\n".join(lines) + "\n"


def _judge(row: dict[str, Any]) -> dict[str, str]:
    runs = [run for run in row["runs"].values() if "unsupported" not in run]
    why: dict[str, None] = {}

    def said(*names: str) -> str:
        answers = [run[n] for run in runs for n in names if n in run]
        for answer in answers:
            for one in (answer.get("first") or {"": answer}).values() if _bad(answer) else ():
                why[_plain(one["message"])[:150]] = None
        if any(map(_bad, answers)):
            return "no"
        return "ok" if any(a == "ok" or "sites" in a for a in answers) else "."

    first = next((run for run in runs if "n_attention" in run), {})
    numbers = [str(first.get(n, 0)) for n in ("n_attention", "n_ffn", "n_linear")]
    splice = said("attention")
    refused = [run["attention"].get("bad", {}) for run in runs if _bad(run.get("attention", ""))]
    if splice == "no" and refused and all(set(bad) == {"inducer"} for bad in refused):
        splice = "lora"
    judged = {
        "type": row["type"],
        "found": f"{numbers[0]} + {numbers[1]} (+ {numbers[2]})",
        "attention": numbers[0] if numbers[0] != "0" else "",
        "splice": splice,
        "start": said("eval", "train", "batch1"),
    }
    judged |= {name: said(name) for name in ("alive", "generate", "remove")}
    said("locate")
    if "crash" in row:
        why[_plain(row["crash"]["message"])], judged["timed"] = None, ""
    for path in sorted({p for run in runs for p in run.get("unclaimed", ())})[:2]:
        why[f"softmax in {path}: not attention"] = None
    return judged | {"why": "; ".join(why)}


def _bad(answer: Any) -> bool:
    return isinstance(answer, dict) and "error" in answer


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "/").replace("<", "").replace(">", "")


if __name__ == "__main__":
    files, *table = " ".join(sys.argv[1:]).split(" --table ")
    lines = [line for name in files.split() for line in Path(name).read_text().splitlines()]
    rows = [json.loads(line) for line in lines]
    rows.sort(key=lambda row: row["type"])
    print(summary(rows))
    if table:
        Path(table[0]).write_text(markdown(rows))
