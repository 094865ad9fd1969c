"""Plugin modules and the entry points that name them."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

import surgery


def plugin(name: str, method_name: str) -> None:
    """Put a plugin module where an entry point can import it."""

    @dataclass(frozen=True)
    class Made(surgery.Method):
        """A method."""

        name = method_name

    module: Any = types.ModuleType(name)
    module.register_methods = surgery.hookimpl(lambda register: register(Made))
    sys.modules[name] = module


def point(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, "surgery")
