"""Host: a module that stays the object it was while its forward runs a rewritten graph.

The object keeps its place, parameters, hooks and attributes; its class becomes a generated
subclass of the same name whose ``forward`` picks the graph for the call at hand. A graph is one
path through the original forward, so calls of another structure get another *variant*, captured
when first met. ``uninstall`` puts the class back: bit for bit the module that it was.
"""

from __future__ import annotations

import functools
import types
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from surgery import huggingface
from surgery.apply import apply_edit
from surgery.capture import capture
from surgery.compiled import prepare
from surgery.errors import CaptureError, SpliceError
from surgery.module_sites import module_pattern
from surgery.patching import one_at_a_time
from surgery.patterns import Pattern, find_patterns
from surgery.quiet import capturing
from surgery.registry import registry
from surgery.signature import Recogniser, signature
from surgery.sites import Edit, HostPlan
from surgery.tracer import Captured
from surgery.values import by_name
from surgery.variant import Children, GuardFlipped, Variant

_STATE = "_surgery"
_MANY = 24  # variants of one host, after which its user is told
_KEPT = 4  # variants that are asked for before a call is described
_compiling = torch.compiler.is_dynamo_compiling


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
            self.recent = ((known, variant), *others[: _KEPT - 1])

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
    return vars(module).get(_STATE)


def is_host(module: nn.Module) -> bool:
    """Is something spliced into this very module?"""
    return _STATE in vars(module)


def hosts(model: nn.Module) -> dict[str, nn.Module]:
    """The hosts in a model, by path."""
    return {path: m for path, m in model.named_modules() if is_host(m)}


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a host had before it became one."""
    return type(module)._surgery_original if _STATE in vars(module) else type(module)  # type: ignore[attr-defined]


@functools.cache
def _host_class(original: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state: HostState = self.__dict__[_STATE]
        if not state.active or capturing():
            return original.forward(self, *args, **kwargs)
        return (run if state.wraps else run_graph)(self, state, args, kwargs)

    def unspliced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return original.forward(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _rebuild, (original,), self.__dict__

    body = {
        "forward": forward,
        "_unspliced_forward": unspliced,
        "__reduce_ex__": reduce,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_surgery_original": original,
    }
    return type(original.__name__, (original,), body)


def _rebuild(original: type[nn.Module]) -> nn.Module:
    host_class = _host_class(original)  # type: ignore[arg-type]
    return host_class.__new__(host_class)


def install(module: nn.Module, plan: HostPlan) -> HostState:
    """Make ``module`` a host, if it is none yet.

    Raises:
        SpliceError: something else has replaced the module's forward on the instance.
    """
    state = state_of(module)
    if state is not None:
        return state
    if "forward" in vars(module) and "_old_forward" not in vars(module):
        raise SpliceError(
            f"{plan.path}: something has set a forward on this {type(module).__name__} object "
            "itself, which would hide the spliced one. Undo that first, splice, then redo it."
        )
    state = HostState(plan.path, plan.through)
    module.__class__ = _host_class(type(module))  # type: ignore[arg-type]
    vars(module)[_STATE] = state
    if "_old_forward" in vars(module):  # accelerate's hooks call what they found
        vars(module)["_old_forward"] = types.MethodType(type(module).forward, module)
    return state


def uninstall(module: nn.Module) -> None:
    """Give a host its own class back."""
    original = original_class(module)
    del vars(module)[_STATE]
    module.__class__ = original
    if "_old_forward" in vars(module):
        vars(module)["_old_forward"] = types.MethodType(original.forward, module)


def run(module: nn.Module, state: HostState, args: Any, kwargs: Any) -> Any:
    """What the host does now: its graph, inside what is wrapped around the call."""
    if not state.wraps:
        return run_graph(module, state, args, kwargs)

    own = original_class(module).forward

    def forward(**named: Any) -> Any:
        if state.edited:
            return run_graph(module, state, (), named)
        return own(module, **named)

    for child in state.wraps:
        forward = functools.partial(getattr(module, child), forward)
    return forward(**by_name(own, module, args, kwargs))


def run_graph(module: nn.Module, state: HostState, args: Any, kwargs: Any) -> Any:
    """Run the variant for this call, capturing it if it is new."""
    if _compiling():
        prepare(module, args, kwargs, foresee)
        return _find_and_run(module, state, args, kwargs)
    for known, variant in state.recent:
        inputs = known(module, args, kwargs)
        if inputs is not None:
            children = state.children
            if children is None or children.__dict__ is not module._modules:
                children = state.children_of(module)
            try:
                return variant.run(children, module, *inputs)
            except GuardFlipped:
                continue
    return _find_and_run(module, state, args, kwargs)


def _find_and_run(module: nn.Module, state: HostState, args: Any, kwargs: Any) -> Any:
    """The same for a call that has to be described first."""
    variants, inputs = state.find(args, kwargs)
    for variant in variants:
        if variant.matches(module, inputs):
            if not _compiling():
                state.remember(variant, args, kwargs)
            try:
                return variant.run(module, module, *inputs)
            except GuardFlipped:
                continue
    variant = new_variant(module, state, args, kwargs)
    if not variant.matches(module, inputs):
        raise CaptureError(
            f"{state.path}: a graph just captured does not fit its own call, so every call would "
            f"be captured anew. It relies on: {variant.guards}. Keep the module that decides "
            "this whole with the is_leaf hook."
        )
    try:
        return variant.run(module, module, *inputs)
    except GuardFlipped as flip:
        raise CaptureError(f"{state.path}: {flip}") from None


def foresee(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Have a variant for a call like this one."""
    state = state_of(module)
    assert state is not None
    variants, inputs = state.find(args, kwargs)
    if not any(variant.matches(module, inputs) for variant in variants):
        new_variant(module, state, args, kwargs)


def new_variant(module: nn.Module, state: HostState, args: Any, kwargs: Any) -> Variant:
    """Capture the host's own forward for this call and apply what has been spliced."""
    with one_at_a_time:
        captured, patterns = capture_host(module, state.path, state.through, args, kwargs)
        for name in state.active:
            operation = state.operations[name]
            for edit, child in zip(operation.edits, operation.children, strict=True):
                apply_edit(patterns, edit, child, module)
        variant = Variant(captured)
        key, _ = signature(args, kwargs, state.active)
        state.variants.setdefault(key, []).insert(0, variant)
        total = sum(map(len, state.variants.values()))
        if total == _MANY:
            warnings.warn(
                f"{state.path}: {total} variants of one host so far; each new one costs a capture. "
                f"The latest differs in: {variant.guards or key}. See surgery.variants(model).",
                stacklevel=2,
            )
        return variant


def capture_host(
    module: nn.Module, path: str, through: frozenset[str], args: Any, kwargs: Any
) -> tuple[Captured, list[Pattern]]:
    """The unedited graph of a host for one call, and the patterns in it."""
    forward = original_class(module).forward
    captured = capture(
        module,
        forward,
        args,
        kwargs,
        through,
        huggingface.attention_patch,
        path,
        registry().is_leaf,
    )
    known = {(id(owner), name) for owner, name, _ in captured.reads}
    for owner, name in huggingface.choices(module):
        answer = getattr(owner, name)
        if name not in vars(owner):
            captured.ambient.append((functools.partial(getattr, owner, name), answer))
        elif (id(owner), name) not in known:
            captured.reads.append((owner, name, answer))
    return captured, find_patterns(captured.graph, module) or module_pattern(captured.graph)
