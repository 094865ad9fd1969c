"""Run a host: find the graph that fits the call, or capture a new one.

    host(*args, **kwargs)
      |  wrapped around the call?  run -> wrapping modules -> run_graph
      v
    recogniser of each recent variant     straight-line code; a few microseconds
      |  none fits
      v
    signature -> variants with this signature -> guards hold?
      |  none fits
      v
    new_variant: capture the host's own forward, apply every edit, compile

A graph lives as long as its host; ``splice`` and ``remove`` drop the graphs of the hosts that they
change. While ``torch.compile`` reads a host, a missing graph is captured beside Dynamo
(host/dynamo.py).
"""

from __future__ import annotations

import functools
import types
import warnings
from typing import Any

import torch
from torch import nn

from surgery.capture import Captured, Read, capture, run_always_called_hooks
from surgery.errors import ForwardError, PortError, RefusedError
from surgery.host.call_signature import signature
from surgery.host.containers import hiding
from surgery.host.divided_later import divide_alike, divide_wrapped, plan_reads
from surgery.host.dynamo import prepare
from surgery.host.foreign_forward import own_forward, unbound, unbound_forward
from surgery.host.selection import KEPT, Selection
from surgery.host.state import HostState, original_class, state_of
from surgery.host.variant import GuardFlipped, Variant
from surgery.interop import (
    exclusively,
    huggingface,
    named_arguments,
    told_again,
    unspliced_forward,
    untraced,
)
from surgery.patterns import Match, find_matches, match_block, module_match, uses_of
from surgery.plugin import Edit, is_leaf
from surgery.rewrite import apply_edit, dtype_reads, lead_caches, share_products

_compiling = torch.compiler.is_dynamo_compiling


def run(
    module: nn.Module, state: HostState, args: Any, kwargs: Any, on: Selection | None = None
) -> Any:
    """Run the host: its graph, inside the modules that wrap its call."""
    on = on or state.selection()
    if not on.wraps:
        return run_graph(module, state, args, kwargs, on)
    if not _compiling():
        divide_wrapped(module, state, args, kwargs)

    own = unbound_forward(module, state)

    def forward(*given: Any, **named: Any) -> Any:
        with told_again(module, given, named):
            if on.edited:
                return run_graph(module, state, given, named, on)
            with hiding(module):
                return own(module, *given, **named)

    children = module if _compiling() else on.children_of(module)
    for child in on.wraps:
        forward = functools.partial(getattr(children, child), forward)
    if not on.by_name:
        return forward(*args, **kwargs)
    return forward(**named_arguments(own, args, kwargs))


def run_graph(
    module: nn.Module, state: HostState, args: Any, kwargs: Any, on: Selection | None = None
) -> Any:
    """Run the variant that fits this call; capture it if there is none.

    Raises:
        ForwardError: the forward cannot be captured for this call, or a branch inside the graph
            flips after a KV cache has changed.
    """
    if on is None:
        on = state.selection()
    if _compiling():
        prepare(module, args, kwargs, ensure_variant)
        return _find_and_run(module, state, args, kwargs, on)
    try:
        if torch._C._get_tracing_state():
            # A second trace checks the first: both must go one way, and neither see a capture.
            with untraced():
                ensure_variant(module, args, kwargs)
            return _find_and_run(module, state, args, kwargs, on)
        for recognise, variant in on.recent:
            inputs = recognise(module, args, kwargs)
            if inputs is not None:
                try:
                    return variant.run(on.children_of(module), module, *inputs)
                except GuardFlipped:
                    continue
        return _find_and_run(module, state, args, kwargs, on)
    except Exception:
        run_always_called_hooks(module)
        raise


def _find_and_run(
    module: nn.Module, state: HostState, args: Any, kwargs: Any, on: Selection
) -> Any:
    """Run a call that no recogniser knows: describe it and compare signatures."""
    children = module if _compiling() else on.children_of(module)
    variants, inputs = on.find(args, kwargs)
    for variant in variants:
        if variant.matches(module, inputs):
            if not _compiling():
                on.remember(variant, args, kwargs)
            try:
                return variant.run(children, module, *inputs)
            except GuardFlipped:
                continue

    def capture_as_now() -> Any:
        """Capture a variant, unless another thread has spliced or removed since the call began.

        What was spliced in before a tensor-parallel plan is divided here, once.
        """
        divide_alike(module, state, args, kwargs)
        now = on if _compiling() else state.selection()
        if now is not on:
            return now, None, False
        made = new_variant(module, state, args, kwargs, on)
        return on, made, made.matches(module, inputs)

    now, variant, fits = exclusively(capture_as_now)
    if now is not on:
        return _run_as_now(module, state, args, kwargs, now)
    if not fits:
        raise ForwardError(
            f"{state.path}: a graph just captured does not fit its own call, so every call would "
            f"be captured anew. It relies on: {variant.relies_on()}. Keep the module that decides "
            "whole with the is_leaf hook."
        )
    try:
        return variant.run(children, module, *inputs)
    except GuardFlipped as flip:
        raise ForwardError(f"{state.path}: {flip}") from None


def _run_as_now(module: nn.Module, state: HostState, args: Any, kwargs: Any, now: Selection) -> Any:
    """Run the forward of a call with the splices that are on by now, not with those it began with.

    Modules that wrap the call are around this already, as they were when the call began.
    """
    if now.edited:
        return run_graph(module, state, args, kwargs, now)
    with hiding(module):
        return unspliced_forward(module)(*args, **kwargs)


def ensure_variant(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Capture a variant for calls like this one, if there is none."""
    state = state_of(module)
    assert state is not None
    divide_alike(module, state, args, kwargs)
    on = state.selection()
    variants, inputs = on.find(args, kwargs)
    for variant in variants:
        if variant.matches(module, inputs):
            variants.remove(variant)
            variants.insert(0, variant)  # where Dynamo, which cannot ask all, looks first
            on.touch(variant)
            return
    new_variant(module, state, args, kwargs, on)


def new_variant(
    module: nn.Module, state: HostState, args: Any, kwargs: Any, on: Selection
) -> Variant:
    """Capture the host's own forward for this call and apply every active edit.

    Raises:
        ForwardError: the forward cannot be captured, or an edit does not fit this graph.
    """
    captured = exclusively(lambda: _edited(module, state, args, kwargs, on))
    variant = Variant(captured)
    key, _ = signature(args, kwargs, on.names)
    if on.add(variant, key) and not state.told:
        state.told = True
        warnings.warn(
            f"{state.path}: calls of more than {KEPT} kinds, each with a graph of its own. The "
            "least recently used graph is dropped from now on, and a call that needs it again "
            f"pays for another capture. The latest differs in: {variant.branches or key}. See "
            "surgery.variants(model).",
            stacklevel=2,
        )
    return variant


def _edited(module: nn.Module, state: HostState, args: Any, kwargs: Any, on: Selection) -> Captured:
    """Capture the host's own forward, and apply the edits that are on."""
    try:
        captured, matches = capture_host(module, state.path, state.through, args, kwargs)
        apply_all(module, state, captured, matches, on)
        for _, child in on.edits:
            captured.reads += dtype_reads(module.get_submodule(child))
    except RefusedError as error:
        raise ForwardError(f"{state.path}: this call needs a new graph. {error}") from error
    return captured


def apply_all(
    module: nn.Module, state: HostState, captured: Captured, matches: list[Match], on: Selection
) -> None:
    """Apply the edits that are on to a captured graph of their host."""
    for edit, child, partly in on.steps:
        if not apply_edit(matches, edit, child, module, partly):
            _require_absent(state, edit, child, captured, matches)
    lead_caches(captured.graph, module)
    share_products(captured.graph, module)


def _require_absent(
    state: HostState, edit: Edit, child: str, captured: Captured, matches: list[Match]
) -> None:
    """Raise if this graph runs the weights of a site in which an edit could not be made.

    Streams of one attention may share weights: a use for each site that is there is not meant.
    """
    there = [state.weights.get((m.kind, m.key), frozenset()) for m in matches]
    used = {
        name
        for name in state.weights.get((edit.kind, edit.site), frozenset())
        if uses_of(captured.graph, name) > sum(name in names for names in there)
    }
    if used and not any(match.is_site(edit.kind, edit.site) for match in matches):
        raise PortError(
            f"the {edit.kind} that {child!r} was spliced into is not recognised in it any more, "
            f"though it runs {', '.join(sorted(used))}: what this forward depends on was changed "
            "after the splice. Undo that, or take the splice out first (surgery.remove) and "
            "splice again. A layer in it that branches on its input must be kept whole by the "
            "is_leaf hook."
        )


def capture_host(
    module: nn.Module, path: str, through: frozenset[str], args: Any, kwargs: Any
) -> tuple[Captured, list[Match]]:
    """Capture the unedited graph of a host for one call, and find the matches in it."""
    own = own_forward(module)
    forward = unbound(own, module)
    with hiding(module):
        captured = capture(
            module,
            forward,
            args,
            kwargs,
            through,
            huggingface.attention_patch,
            path,
            is_leaf,
        )
    known = {(id(read.place), read.name) for read in captured.reads}
    for owner, name in huggingface.choices(module):
        answer = getattr(owner, name)
        if name not in vars(owner):
            captured.ambient.append((functools.partial(getattr, owner, name), answer))
        elif (id(vars(owner)), name) not in known:
            captured.reads.append(Read("item", vars(owner), name, answer))
    captured.reads += plan_reads(captured.graph, module)
    if own == types.MethodType(original_class(module).forward, module):
        captured.reads.append(Read("attribute", original_class(module), "forward", forward))
    matches = find_matches(captured.graph, module) or module_match(captured.graph)
    return captured, matches + match_block(captured.graph)
