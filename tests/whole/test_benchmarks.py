"""The benchmarks run, on small sizes; what they measure is in benchmarks/RESULTS.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_serving_runs_and_a_route_gives_what_each_adapter_gives_alone() -> None:
    sizes = ["--layers", "1", "--repeats", "2", "--adapters", "3"]
    command = [sys.executable, "benchmarks/serving.py", *sizes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "ours / PEFT" in done.stdout
    gap = float(done.stdout.split("from each row alone ")[1].split()[0])
    assert gap < 1e-5
