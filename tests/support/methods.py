"""Options of methods that cannot do without."""

from __future__ import annotations

from typing import Any

import surgery

NEEDED: dict[str, dict[str, Any]] = {"tokens": {"tokens": (1, 2)}}


def default(name: str) -> surgery.Method:
    """Return a method with its default options, and those that it needs."""
    return surgery.method(name, **NEEDED.get(name, {}))
