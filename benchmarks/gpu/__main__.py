"""Check and measure on a GPU, section by section, within a time budget.

Run: make gpu        or: python -m benchmarks.gpu [--tiny] [--out DIR] [--minutes 7]

Sections run one by one, the most telling first. A check that fails is recorded, the rest goes on,
and the exit status is 1. A check that would overrun the budget is recorded as not run. --tiny has
small shapes and runs on a CPU, too.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import peft
import torch
import transformers

from benchmarks.gpu import core, correctness, kernels, report, speed
from benchmarks.gpu.record import Record
from benchmarks.timing import console

ROOT = Path(__file__).parents[2]
SECTIONS: dict[str, Callable[[Record, bool], None]] = {
    "kernels": kernels.check,
    "core": core.check,
    "steps": speed.steps,
    "methods": correctness.check,
    "decode": speed.decode,
    "compiled": speed.compiled,
}


def head() -> dict[str, str]:
    """Return what a run runs on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        commit = done.stdout.strip()
    except OSError:  # no git here
        commit = ""
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    return {"device": device, **versions, "commit": commit or "unknown"}


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    options.add_argument("--tiny", action="store_true", help="small shapes; a CPU will do")
    options.add_argument("--out", type=Path, help="the folder of the report")
    options.add_argument("--minutes", type=float, default=7.0, help="the time budget")
    options.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    args = options.parse_args(arguments)
    if not torch.cuda.is_available() and not args.tiny:
        options.error(
            "torch sees no GPU on this machine, so nothing was measured. Run this on a machine "
            "with a CUDA device, or add --tiny for a trial with small shapes on the CPU."
        )
    folder = args.out or (Path(tempfile.mkdtemp()) if args.tiny else ROOT / "benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    record = Record(folder / "RESULTS_GPU.json", 60 * args.minutes - 10, head())
    if args.tiny:
        record.head["shapes"] = "tiny and float32, whatever a title says; no bar is judged"
    for key, bar in (core.BARS | speed.BARS).items():
        record.bars[key] = replace(bar, judged=not args.tiny)
    for name in args.sections:
        before = record.left
        try:
            SECTIONS[name](record, args.tiny)
        except Exception as error:  # outside of any check
            record.failed.append(f"section {name}: {type(error).__name__}: {error}")
        record.head[f"seconds of {name}"] = f"{before - record.left:.0f}"
        path = report.write(record, folder)
    record.write()
    for said in [*map(str, record.bars.values()), *record.failed]:
        console.print(said, markup=False, highlight=False)
    console.print(f"{path}", markup=False, highlight=False)
    return 1 if record.failed else 0


if __name__ == "__main__":
    sys.exit(main())
