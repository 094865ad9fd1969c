"""Keep the trials of a sweep in Optuna: which point comes next, and what each scored.

All studies of a grid share one journal, ``OUTPUT/sweep/optuna.log``, which ``optuna-dashboard`` and
``optuna.load_study`` read. There is one study for each recipe and number of steps. The scores
themselves are read from the folders of the runs, so a lost journal loses nothing else.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surgery import RecipeError

JOURNAL = "optuna.log"
BOUNDS = (0.0, 1e300)  # of the axis of rates: the same in every study, whatever is tried
SEEDS = 2**62
Point = tuple[float, int]


def require_optuna() -> None:
    """Raise unless Optuna is installed.

    Raises:
        RecipeError: it is not.
    """
    if importlib.util.find_spec("optuna") is None:
        raise RecipeError("--sweep searches with optuna. pip install 'surgery[recipes]'")


def open_journal(folder: Path) -> Any:
    """The storage of all studies, in a file of the folder."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(folder / JOURNAL)))


class Study:
    """The points of a grid of rates and seeds, each of which Optuna gives out once.

    Args:
        storage: what :func:`open_journal` gives.
        name: the name of the study. A study of that name goes on.
        rates, seeds: the axes of the grid.
    """

    def __init__(
        self, storage: Any, name: str, rates: Sequence[float], seeds: Sequence[int]
    ) -> None:
        import optuna

        self.points = [(rate, seed) for rate in rates for seed in seeds]
        self.failed = optuna.trial.TrialState.FAIL
        self.study = optuna.create_study(
            storage=storage, study_name=name, direction="maximize", load_if_exists=True
        )
        for left in self.study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            self.study.tell(left.number, state=self.failed)  # its process was killed
        self.open: dict[Point, Any] = {}

    def ask(self) -> list[Point]:
        """Return the points that have no score yet.

        Every point is queued: Optuna's GridSampler would draw the same points, but it ends a study
        that is asked from outside of ``optimize`` with an error.
        """
        done = {self._point(t) for t in self.study.get_trials() if t.value is not None}
        todo = [point for point in self.points if point not in done]
        for rate, seed in todo:
            self.study.enqueue_trial({"rate": rate, "seed": seed})
        while set(todo) - set(self.open):
            trial = self.study.ask()
            point = (trial.suggest_float("rate", *BOUNDS), trial.suggest_int("seed", 0, SEEDS))
            if point in todo and point not in self.open:
                self.open[point] = trial
            else:  # an interrupted sweep had queued it
                self.study.tell(trial, state=self.failed)
        return list(self.open)

    @staticmethod
    def _point(trial: Any) -> Point:
        return trial.params.get("rate", 0.0), trial.params.get("seed", 0)

    def tell(self, point: Point, score: float | None, better: int = 1) -> None:
        """Record the score of a point; None for a trial that failed.

        Args:
            point: the rate and the seed.
            score: its validation score.
            better: 1 if a higher score is better, -1 if a lower one is.
        """
        if point not in self.open:
            return
        trial = self.open.pop(point)
        if score is None:
            self.study.tell(trial, state=self.failed)
        else:
            trial.set_user_attr("score", score)
            self.study.tell(trial, better * score)
