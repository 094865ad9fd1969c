"""Keep what was measured: rows, bars, failures, and how much of the time is left.

Every change is written to a JSON file at once, so that a run that is killed loses nothing.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType

from benchmarks.timing import console, verdict

Cells = dict[str, str]
OUT_OF_TIME = "not run: out of time"


class TookTooLongError(BaseException):
    """A check took longer than it may. No ``except Exception`` inside the check swallows it."""


@dataclass(frozen=True)
class Bar:
    """A figure that the project has promised to reach.

    Attributes:
        what: what is measured.
        bar: the figure.
        at_least: whether the value should be as high as the bar, or as low.
        value: the measured value; None until it is measured.
        judged: whether the shapes are those that the bar was set for.
    """

    what: str
    bar: float
    at_least: bool = False
    value: float | None = None
    judged: bool = True

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        if self.value is None:
            return f"{self.what}: not measured, bar {sign} {self.bar:g}"
        said = verdict(self.value, self.bar, self.at_least) if self.judged else "tiny, not judged"
        return f"{self.what}: {self.value:.3f}, bar {sign} {self.bar:g}: {said}"


@dataclass
class Record:
    """What one run has measured so far.

    Attributes:
        path: the JSON file.
        seconds: the time budget of the run.
        head: what the run ran on.
        tables: the cells of each row, by title and by name of the row.
        bars: the figures that have a bar, by key.
        failed: the rows that failed.
        curves: points by title and name, for the picture.
    """

    path: Path
    seconds: float
    head: dict[str, str]
    tables: dict[str, dict[str, Cells]] = field(default_factory=dict)
    bars: dict[str, Bar] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    curves: dict[str, dict[str, list[tuple[float, float]]]] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self.seconds - (time.monotonic() - self.started)

    def attempt(
        self,
        title: str,
        name: str,
        check: Callable[[], Cells],
        needs: float,
        limit: float = 60.0,
        ours: bool = True,
    ) -> bool:
        """Run one check and keep its cells as a row; an error becomes the row.

        Args:
            title, name: the table and the row.
            check: gives the cells by column.
            needs: the seconds that it is expected to take. If fewer are left, it is not run.
            limit: the seconds after which it is stopped.
            ours: whether an error is a failure of the run; PEFT's own errors are not.

        Returns:
            whether the check ran to its end.
        """
        if self.left < needs:
            self.row(title, name, {"": OUT_OF_TIME})
            return False
        try:
            with at_most(min(limit, self.left)):
                cells = check()
        except TookTooLongError:
            if self.left < 1:
                self.row(title, name, {"": OUT_OF_TIME})
                return False
            said = f"took over {limit:.0f} s"
        except Exception as error:
            said = first_line(error)
        else:
            self.row(title, name, cells)
            return True
        self.row(title, name, {"": f"FAILED {said}" if ours else f"PEFT's error: {said}"})
        if ours:
            self.failed.append(f"{title}: {name}: {said}")
            self.write()
        return False

    def row(self, title: str, name: str, cells: Cells) -> None:
        """Add cells to a row."""
        self.tables.setdefault(title, {}).setdefault(name, {}).update(cells)
        self.write()
        shown = ", ".join(f"{column} {cell}".strip() for column, cell in cells.items() if cell)
        if not shown:
            return
        spent = self.seconds - self.left
        console.print(f"[{spent:4.0f} s] {title}: {name}: {shown}", highlight=False, markup=False)

    def measured(self, key: str, value: float) -> None:
        """Give a bar its value."""
        self.bars[key] = replace(self.bars[key], value=value)
        self.write()
        console.print(str(self.bars[key]), highlight=False, markup=False)

    def write(self) -> None:
        """Write the file anew, whole or not at all."""
        kept = ("head", "tables", "failed", "curves")
        found = {name: getattr(self, name) for name in kept}
        found["bars"] = {key: {**asdict(bar), "said": str(bar)} for key, bar in self.bars.items()}
        found["seconds"] = round(self.seconds - self.left, 1)
        half = self.path.with_suffix(".part")
        half.write_text(json.dumps(found, indent=1))
        os.replace(half, self.path)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise :class:`TookTooLongError` in the block after so many seconds."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TookTooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def first_line(error: Exception) -> str:
    """Return the class of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}".replace("|", "/")
