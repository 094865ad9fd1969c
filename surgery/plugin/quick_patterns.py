"""Tell regular expressions that end soon in any path from those that may take for ever.

Adapters come from strangers, and their patterns are run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

_MOST = 5e6  # steps; about a second for all sites of a large model

_QUANTIFIER = r"[*+?]|\{\d+(?:,\d*)?\}|\{,\d*\}"
_TOKENS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?:?|" + _QUANTIFIER + "|.", re.DOTALL)
_DIGITS = ("\\d", "[0-9]")  # a path has few in a row


def are_quick_patterns(patterns: Iterable[str]) -> bool:
    """Whether these are regular expressions that, all together, end soon in any path.

    They do with at most three open repeats (``* + ? {m,n}``; digits are free), none of a group but
    ``(...)?``, without ``(?...)`` but ``(?:...)``, and without ``\\1``.

    Example:
        >>> surgery.are_quick_patterns(["layers.[0-3]"]), surgery.are_quick_patterns(["(a*)*b"])
        (True, False)
    """
    listed = list(patterns)
    return all(map(_is_regular_expression, listed)) and sum(map(_steps, listed)) < _MOST


def _is_regular_expression(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError, Warning):
        return False
    return True


def _steps(pattern: str) -> float:
    """Return about how many steps a search may take in a path of 60 characters.

    Each open repeat multiplies the ways to match by the length, and each group by its alternatives.
    A repeated group may have exponentially many, as in ``(.*.*)*x``: it takes infinitely long here.
    """
    tokens = _TOKENS.findall(pattern)
    repeats, ways, bars = 0, 1, [0]
    for before, token in zip(["", *tokens], tokens, strict=False):
        if token in ("(", "(?:"):
            bars.append(0)
        elif token == "|":
            bars[-1] += 1
        elif token == ")":
            ways *= 1 + bars.pop()
        elif token == "(?" or re.fullmatch(r"\\[1-9]", token):
            return math.inf
        elif re.fullmatch(_QUANTIFIER, token) and not re.fullmatch(_QUANTIFIER, before):
            if before == ")" and token != "?":
                return math.inf
            repeats += before not in _DIGITS
    return float(ways * (1 + bars[0]) * 60 ** (repeats + 1) / math.factorial(repeats + 1))
