"""METEOR 1.5, computed by its authors' Java program, which ``pycocoevalcap`` carries.

Without Java or the package METEOR is left out, and ``why_not`` gives the reason. No other
implementation replaces it, because others give other numbers.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

LABEL = "METEOR 1.5, -l en -norm (pycocoevalcap)"


def why_not() -> str:
    """The reason why METEOR cannot be computed here, or "" if it can."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        return "no METEOR: pip install 'surgery[recipes]'"
    if shutil.which("java") is None:
        return "no METEOR: it needs Java"
    return ""


@contextmanager
def scorer() -> Iterator[Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, float]]]:
    """A function that computes ``meteor``, between 0 and 1, or nothing if it cannot be computed.

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
