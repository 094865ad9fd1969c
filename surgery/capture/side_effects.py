"""Keep what a forward changes: it becomes nodes at the end of the graph, and is undone here.

A forward may keep a tensor as an attribute, as models with a table of positions do, or put it into
a dict or list of its own. The graph does the same when it runs; the capture itself leaves nothing
behind. Other changes of lists, dicts and sets are refused, as a graph would lose them.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

from surgery.capture.reads import MISSING, Contents, Read, contents, same
from surgery.capture.tracer import Tracer
from surgery.errors import CaptureError


def record_changes(tracer: Tracer, path: str) -> None:
    """Add a node for each attribute and item that the forward has set.

    Raises:
        CaptureError: the forward has changed a container in another way.
    """
    watcher = tracer.watcher
    for owner, held, name, before in watcher.changes:
        now = held.get(name, MISSING)
        if now is not MISSING and now is not before:
            _node(tracer, setattr, owner, name, now)
    for container, before, now in _changed(watcher.reads.values()):
        grown = len(before.values)
        if isinstance(container, dict) and now.keys[:grown] == before.keys:
            for key, value in zip(now.keys, now.values, strict=True):
                if key not in before.keys or value is not before.values[now.keys.index(key)]:
                    _node(tracer, operator.setitem, tracer.constant_node(container), key, value)
        elif isinstance(container, list) and same(Contents((), now.values[:grown]), before):
            _node(tracer, extend, tracer.constant_node(container), list(now.values[grown:]))
        else:
            raise CaptureError(
                f"the forward at {path or 'the root'} changes a {type(container).__name__} that it "
                f"keeps, from {len(before.values)} items to {len(now.values)}; a graph can add "
                "items to a list or dict, nothing else. Keep the submodule that does it whole with "
                "the is_leaf hook."
            )


def undo_changes(tracer: Tracer) -> None:
    """Put every attribute and item that the forward has set back to what it was."""
    for _, held, name, before in reversed(tracer.watcher.changes):
        if before is MISSING:
            held.pop(name, None)
        else:
            held[name] = before
    for container, before, _ in _changed(tracer.watcher.reads.values()):
        if isinstance(container, dict):
            container.clear()
            container.update(zip(before.keys, before.values, strict=True))
        elif isinstance(container, set):
            container.clear()
            container.update(*before.values)
        elif isinstance(container, (list, deque)):
            container.clear()
            container.extend(before.values)
        else:
            vars(container).update(zip(before.keys, before.values, strict=True))


def extend(container: list[Any], items: list[Any]) -> None:
    """Add items to a list; a node needs a function of a module as its target."""
    container.extend(items)


def _node(tracer: Tracer, function: Callable[..., Any], *args: Any) -> None:
    """Add a node that is kept though nothing uses its result."""
    arguments = tuple(a if isinstance(a, fx.Node) else tracer.create_arg(a) for a in args)
    node = tracer.graph.call_function(function, arguments)
    node.meta.update(value=None, owner="", keep=True)


def _changed(reads: Any) -> Iterator[tuple[Any, Contents, Contents]]:
    """Yield each container that the forward has changed, with its items before and now."""
    for read in list(reads):
        if isinstance(read, Read) and read.how == "contents":
            now = contents(read.place)
            if not same(now, read.answer):
                yield read.place, read.answer, now
