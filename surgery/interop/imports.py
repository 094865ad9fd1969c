"""Act on a module of another library when it is imported, or at once if it has been.

Nothing here imports the library. The action runs after the module's own code, inside the import.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def on_import(library: str, action: Callable[[ModuleType], None]) -> None:
    """Call ``action`` with each module of a library, now or when it is imported; ask once."""
    if any(isinstance(f, _Finder) and f.library == library for f in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder(library, action))
    for name, module in list(sys.modules.items()):
        if _in(library, name) and isinstance(module, ModuleType):
            action(module)


def _in(library: str, name: str) -> bool:
    return name == library or name.startswith(library + ".")


class _Finder(MetaPathFinder):
    """Finds the modules of one library as Python does, and lets an action follow their code."""

    def __init__(self, library: str, action: Callable[[ModuleType], None]) -> None:
        self.library, self.action = library, action

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if _in(self.library, fullname) else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.action)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Any, action: Callable[[ModuleType], None]) -> None:
        self._loader, self._action = loader, action

    def __getattr__(self, name: str) -> Any:  # get_source, get_data, ... of the original
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._action(module)
