"""Try surgery on the whole zoo: locate, splice, start, alive, generate, remove, for every type.

    python -m tests.zoo.check [types...] [--out FILE] [--table docs/coverage.md]

Each type runs in a worker process with a time limit; one JSON line per type goes to FILE, a table
of them all to a Markdown file, and a summary of the failures to the screen.
"""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.zoo.build import model_types
from tests.zoo.one_type import check
from tests.zoo.report import failure, markdown, summary

LIMIT = 240  # seconds for one type


def worker(types: Iterable[str]) -> None:
    """Check types in this process, one JSON line each."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"{LIMIT} s")

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, stop)
    for model_type in types:
        signal.alarm(LIMIT)
        try:
            row = check(model_type)
        except Exception as error:
            row = {"type": model_type, "build": "ok", "runs": {}, "crash": failure(error)}
        signal.alarm(0)
        print(json.dumps(row), flush=True)


def main(arguments: list[str]) -> None:
    """Check the types given, or all."""
    out = arguments.pop(arguments.index("--out") + 1) if "--out" in arguments else "zoo.jsonl"
    table = arguments.pop(arguments.index("--table") + 1) if "--table" in arguments else None
    types = [a for a in arguments if not a.startswith("--")] or model_types()
    rows: list[dict[str, Any]] = []
    with open(out, "w") as file:
        while len(rows) < len(types):
            for row in _batch(types[len(rows) : len(rows) + 25]):
                rows.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
    print(summary(rows))
    if table:
        Path(table).write_text(markdown(rows))


def _batch(types: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of some types, up to the first that takes its process with it."""
    command = [sys.executable, "-m", "tests.zoo.check", "--worker", *types]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    for model_type in types:
        ready, _, _ = select.select([process.stdout], [], [], LIMIT + 40)
        line = process.stdout.readline() if ready else ""
        while line and not line.startswith("{"):  # something that a library prints
            line = process.stdout.readline()
        if not line:
            process.kill()
            process.wait()
            crash = {"error": "Crash" if ready else "Hang", "message": f"exit {process.returncode}"}
            yield {"type": model_type, "build": "ok", "runs": {}, "crash": crash}
            return
        yield json.loads(line)
    process.wait()


if __name__ == "__main__":
    worker(sys.argv[2:]) if sys.argv[1:2] == ["--worker"] else main(sys.argv[1:])
