"""METEOR 1.5, the authors' own Java program, as ``pycocoevalcap`` carries it.

Without Java or the package there is no METEOR, and ``why_not`` says so; nothing stands in for it,
as other implementations give other numbers.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

LABEL = "METEOR 1.5, -l en -norm (pycocoevalcap)"


def why_not() -> str:
    """Why there is no METEOR here; empty if there is."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        return "no METEOR: pip install 'surgery[recipes]'"
    if shutil.which("java") is None:
        return "no METEOR: it needs Java"
    return ""


@contextmanager
def scorer() -> Iterator[Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, float]]]:
    """A function that gives ``meteor``, between 0 and 1, or nothing where it cannot be had.

    The program takes seconds to start and runs until the ``with`` block ends.
    """
    if why_not():
        yield lambda answers, references: {}
        return
    from pycocoevalcap.meteor.meteor import Meteor

    program = Meteor()

    def measure(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        value, _ = program.compute_score(
            {i: [" ".join(text.split()) for text in own] for i, own in enumerate(references)},
            {i: [" ".join(answer.split())] for i, answer in enumerate(answers)},
        )
        return {"meteor": float(value)}

    try:
        yield measure
    finally:
        for pipe in (program.meteor_p.stdin, program.meteor_p.stdout, program.meteor_p.stderr):
            pipe.close()
        program.meteor_p.wait()
