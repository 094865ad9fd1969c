"""State: what a host knows: its splices, its graphs, and which of them are on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from surgery.host.call_signature import Recogniser, signature
from surgery.host.variant import Children, Variant
from surgery.plugin import Edit

STATE = "_surgery"


_ASKED_FIRST = 4  # variants that are asked for before a call is described


@dataclass
class Operation:
    """What one splice did to one host."""

    name: str
    edits: list[Edit]
    children: list[str]  # the child of each edit, as it is called on the host


@dataclass
class HostState:
    """What a host needs beside the module itself."""

    path: str
    through: frozenset[str]
    operations: dict[str, Operation] = field(default_factory=dict)
    off: frozenset[str] = frozenset()
    variants: dict[Any, list[Variant]] = field(default_factory=dict)
    recent: tuple[tuple[Recogniser, Variant], ...] = ()  # what is asked for first
    children: Children | None = None  # the host's; a replica of it has others
    active: tuple[str, ...] = ()
    wraps: tuple[str, ...] = ()  # children around the call, the first innermost
    edited: bool = False  # does the forward itself run a rewritten graph?

    def refresh(self) -> None:
        """To be called when the operations, or which of them are off, have changed."""
        self.active = tuple(name for name in self.operations if name not in self.off)
        on = [self.operations[name] for name in self.active]
        pairs = [pair for o in on for pair in zip(o.edits, o.children, strict=True)]
        self.wraps = tuple(child for edit, child in pairs if edit.verb == "wrap")
        self.edited = len(self.wraps) < len(pairs)
        self.recent = ()

    def keep_only(self, variants: dict[Any, list[Variant]]) -> None:
        """Forget all other graphs."""
        self.variants, self.recent = variants, ()

    def find(self, args: Any, kwargs: Any) -> tuple[list[Variant], list[Any]]:
        """The graphs of calls with this structure, and the inputs that they take."""
        key, inputs = signature(args, kwargs, self.active)
        return self.variants.get(key, []), inputs

    def remember(self, variant: Variant, args: Any, kwargs: Any) -> None:
        """Ask first, from now on, whether a call is of this variant again."""
        known = variant.recogniser(args, kwargs)
        if known is not None:
            others = [pair for pair in self.recent if pair[1] is not variant]
            self.recent = ((known, variant), *others[: _ASKED_FIRST - 1])

    def children_of(self, module: nn.Module) -> Children:
        """The children of the host, or of a replica that shares this state for a while."""
        made = Children(module)
        if self.children is None or self.children.belongs_to(module):
            self.children = made
        return made

    def __getstate__(self) -> dict[str, Any]:
        # They refer to this very module, so another captures anew.
        return {**self.__dict__, "variants": {}, "recent": (), "children": None}


def state_of(module: nn.Module) -> HostState | None:
    """The state of a host; None for any other module."""
    return vars(module).get(STATE)


def is_host(module: nn.Module) -> bool:
    """Is something spliced into this very module?"""
    return STATE in vars(module)


def hosts(model: nn.Module) -> dict[str, nn.Module]:
    """The hosts in a model, by path."""
    return {path: m for path, m in model.named_modules() if is_host(m)}


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a host had before it became one."""
    return type(module)._surgery_original if STATE in vars(module) else type(module)  # type: ignore[attr-defined]
