"""Time candidates side by side: they take turns, so a disturbance of the machine meets them all."""

from __future__ import annotations

import copy
import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

M = TypeVar("M", bound=nn.Module)
console = Console(width=110)
REPORT: list[str] = []  # Markdown, in the order in which it was measured
BARS: dict[str, dict[str, dict[str, float]]] = {}  # ratios by candidate, by method, by title
LINES: dict[str, dict[str, list[tuple[float, float]]]] = {}  # curves by name, by title


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat of one candidate."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def side_by_side(
    candidates: dict[str, Callable[[], object]], repeats: int, warmup: int = 3
) -> dict[str, Timing]:
    """Run every candidate once per round, with the order reversed every other round.

    Args:
        candidates: the functions to time, by name.
        repeats: number of timed rounds.
        warmup: number of rounds before these that are not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    gc.collect()
    gc.disable()
    try:
        for i in range(warmup + repeats):
            order = list(candidates.items())[:: -1 if i % 2 else 1]
            for name, run in order:
                start = time.perf_counter()
                run()
                if i >= warmup:
                    seconds[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return {name: Timing(tuple(s)) for name, s in seconds.items()}


def sharing(base: M) -> M:
    """Return a copy of ``base`` that shares the memory of its weights.

    The time of a decoded token varies by some per cent with the addresses of the weights, so all
    candidates use the same.
    """
    memo = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in base.parameters()}
    return copy.deepcopy(base, memo)


def paired_ratio(a: Timing, b: Timing) -> float:
    """Return the median over the rounds of ``a / b``; a slow round is slow for both."""
    return statistics.median(x / y for x, y in zip(a.seconds, b.seconds, strict=True))


def machine() -> str:
    """Return one line that names the CPU, threads and versions."""
    cpu = platform.processor() or "CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return (
        f"{cpu}, {torch.get_num_threads()} thread(s), Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


def verdict(value: float, bar: float, at_least: bool = False) -> str:
    """Return ``met`` or ``MISSED``."""
    return "met" if (value >= bar if at_least else value <= bar) else "MISSED"


def line(text: str) -> None:
    """Print a line and add it to the report."""
    console.print(text, highlight=False)
    REPORT.append(text + "  ")


def plot_bars(title: str, values: dict[str, dict[str, float]]) -> None:
    """Add a panel to the report's picture, with a group of bars for each method."""
    BARS[title] = values


def show(title: str, columns: list[str], rows: list[tuple[str, ...]]) -> None:
    """Print a table and add it to the report."""
    head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    body = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    REPORT.append(f"\n### {title}\n\n{head}\n{body}\n")
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
