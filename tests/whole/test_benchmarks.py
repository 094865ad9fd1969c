"""The benchmarks run, on small sizes; what they measure is in benchmarks/RESULTS.md."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import surgery

ROOT = Path(__file__).parents[2]


@pytest.mark.filterwarnings("ignore")  # of PEFT
def test_operators_and_saved_bytes_stay_below_their_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """A count has no noise; PEFT's are counted in the same process."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    operators = importlib.import_module("operators")
    found = operators.counts()
    for key, bars in operators.BARS.items():
        counted = found[(*key, "surgery")]
        assert all(bar is None or n <= bar for n, bar in zip(counted, bars, strict=False)), key
    for model in operators.PROJECTIONS:
        ours, theirs = (found[model, "LoRA on all", whose] for whose in ("surgery", "PEFT"))
        assert all(a < b for a, b in zip(ours[:2], theirs[:2], strict=True))
        assert ours[2] <= theirs[2]


@pytest.mark.slow
def test_serving_runs_and_a_route_gives_what_each_adapter_gives_alone() -> None:
    sizes = ["--layers", "1", "--repeats", "2", "--adapters", "3"]
    command = [sys.executable, "benchmarks/serving.py", *sizes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "ours / PEFT" in done.stdout
    gap, effect = re.findall(r"each row alone (\S+), from the base (\S+)", done.stdout)[0]
    assert float(gap) < 1e-5
    assert float(effect) > 0.1
    assert "the weights of the base are as they were: True" in done.stdout


@pytest.mark.slow
def test_compiled_models_are_timed_and_compiled_in_fresh_processes() -> None:
    sizes = ["--layers", "1", "--repeats", "2", "--processes", "1", "--tasks", "decode"]
    command = [sys.executable, "benchmarks/compiled.py", *sizes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "s to compile" in done.stdout
    assert "of PEFT's, bar <= 1.0" in done.stdout


@pytest.mark.slow
def test_every_section_for_a_gpu_runs_on_small_shapes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    report = (tmp_path / "RESULTS_GPU.md").read_text()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "RESULTS_GPU.json").read_text())
    assert found["failed"] == []
    remarks = [cells[""] for rows in found["tables"].values() for cells in rows.values()
               if "" in cells]  # fmt: skip
    assert remarks == []
    assert all(bar["value"] is not None and bar["what"] in report for bar in found["bars"].values())
    rows = {name for table in found["tables"].values() for name in table}
    assert {*surgery.methods(), "SDPA's choice, padded", "core", "dense"} <= rows
    assert {"LoRA 16 on all linear, PEFT", "prefix 108, PEFT", "prefix 20", "inducer"} <= rows
    titles = " ".join(found["tables"])
    for part in ("Training step, GPT-2", "batch 8, static cache", "Compiled training step"):
        assert part in titles
    assert all(f"| {name} |" in report for name in rows)


@pytest.mark.slow
def test_without_a_gpu_the_check_says_what_to_do() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu"]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=hidden)
    assert done.returncode == 2
    assert "torch sees no GPU" in done.stderr
    assert "--tiny" in done.stderr


@pytest.mark.slow
def test_a_check_that_fails_or_takes_too_long_is_a_row(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from benchmarks.gpu.record import Record
def fail(): raise ValueError("broken\\nmore")
record = Record(Path(sys.argv[1]), 100.0, {})
record.attempt("t", "bad", fail, needs=1)
record.attempt("t", "theirs", fail, needs=1, ours=False)
record.attempt("t", "long", lambda: time.sleep(9), needs=1, limit=0.2)
record.attempt("t", "late", fail, needs=1000)
record.attempt("t", "good", lambda: {"x": "1"}, needs=1)
"""
    path = tmp_path / "found.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment)
    found = json.loads(path.read_text())
    assert found["tables"]["t"] == {
        "bad": {"": "FAILED ValueError: broken"},
        "theirs": {"": "PEFT's error: ValueError: broken"},
        "long": {"": "FAILED took over 0 s"},
        "late": {"": "not run: out of time"},
        "good": {"x": "1"},
    }
    assert [said.split(": ")[1] for said in found["failed"]] == ["bad", "long"]


@pytest.mark.slow
def test_scaling_runs_on_small_sizes() -> None:
    command = [sys.executable, "benchmarks/scaling.py", "--tiny", "--threads", "1"]
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment
    )
    for title in ("on the meta device", "A training step", "Loading adapters", "70 billion"):
        assert title in done.stdout
    assert done.stdout.count("bar <=") == 5
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_part_that_is_renewed_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    report = importlib.import_module("report")
    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr(report, "MEASURED", tmp_path / "measured")
    monkeypatch.setattr(report, "commit", lambda: "1234567")
    (tmp_path / "RESULTS.md").write_text("# Measured\n\n## Old (`scaling.py`)\n\nkept as it is\n")

    def main(arguments: list[str]) -> None:
        report.REPORT.append("ten of them  ")

    monkeypatch.setattr(report.serving, "main", main)
    for _ in range(2):  # again, from its own file
        report.measure("serving")
        report.write()
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.count("kept as it is") == text.count("ten of them") == 1
    assert "(`serving.py`)\n\nCommit 1234567." in text
    assert not (tmp_path / "RESULTS.png").exists()  # the curves of the old part are not kept
