"""Capture a forward: run it once on example values and record it as a ``torch.fx.Graph``.

    capture(host, forward, args, kwargs)
      |  each leaf of the arguments becomes a placeholder and a copy of its value: a proxy
      v
    forward(host, *proxies)                runs while torch's functions are replaced
      |                                    (interception.py)
      |  an operation on a proxy           one node, run on the values too (tracer.py)
      |  a call of a submodule             one node; on the way to a site the module is traced
      |                                    through, and two nodes run its hooks (module_hooks.py)
      |  a call that takes no proxy        one node, such as a factory that makes a mask
      |  bool(), len(), int() of a proxy   the value answers, a branch records it (branches.py)
      |  an attribute, a global, a mode    what was read is recorded (watched_state.py)
      v
    Captured(graph, branches, reads, parts, ambient)

``torch.fx.symbolic_trace`` fails on today's attention code, which asks proxies for their truth,
length and type. Here every proxy carries its value (proxy.py), and sizes stay nodes, so that one
graph is good for any batch and length.

The tracer and its proxies live for one capture. The nodes keep their example values in
``meta["value"]`` until the graph is compiled (surgery/host/variant.py). Capture leaves no trace:
no hook fires, random states and buffers are restored, and the forward works on copies of caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from torch import nn

from surgery.capture.branches import line_of
from surgery.capture.captured import Captured
from surgery.capture.interception import intercepted
from surgery.capture.proxy import any_proxy
from surgery.capture.side_effects import record_changes, undo_changes
from surgery.capture.tracer import IsLeaf, Tracer
from surgery.errors import CaptureError
from surgery.interop import (
    AttentionPatch,
    capture_running,
    detached,
    input_key,
    map_leaves,
    unobserved,
)


def capture(
    module: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    through: Iterable[str] = (),
    attention_patch: AttentionPatch | None = None,
    path: str = "",
    is_leaf: IsLeaf | None = None,
) -> Captured:
    """Capture ``forward(module, *args, **kwargs)`` as a graph.

    Args:
        module: the host; the graph refers to its parameters and submodules.
        forward: an unbound forward of the host.
        args, kwargs: example inputs, nested in tuples, lists and dicts. They are not changed.
        through: paths below ``module`` of the modules to trace through; others stay whole.
        attention_patch: replaces a library's attention functions by ones that stay whole.
        path: the path of the host in the model, for errors.
        is_leaf: whether a module in ``through`` stays whole all the same (the plugins' hook).

    Returns:
        a graph whose placeholders are the host and then the leaves of ``(args, kwargs)``, in the
        order of ``interop.leaves``.

    Raises:
        CaptureError: the forward does something that a graph cannot hold; the message names the
            line.
    """
    with capture_running(), unobserved():
        tracer = Tracer(module, through, is_leaf, texts_are_read=False)
        try:
            captured = _record(tracer, forward, args, kwargs, attention_patch, path)
            if not (tracer.texts and tracer.watcher.looks_closely):
                return captured
        except CaptureError:
            if not tracer.texts:
                raise
        tracer = Tracer(module, through, is_leaf, texts_are_read=True)
        return _record(tracer, forward, args, kwargs, attention_patch, path)


def _record(
    tracer: Tracer,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    attention_patch: AttentionPatch | None,
    path: str,
) -> Captured:
    """Run ``forward`` under the tracer; refuse it if it has side effects that a graph loses."""
    module = tracer.root
    tracer.root_node = tracer.graph.placeholder("host")
    tracer.root_node.meta.update(value=None, owner="")
    tracer.watcher.look_into(forward)
    seen: dict[int, Any] = {}

    def placeholder(value: Any) -> Any:
        key = input_key(value, len(seen))
        if key not in seen:
            node = tracer.graph.placeholder(f"x{len(seen)}")
            node.meta["owner"] = ""
            seen[key] = tracer.wrap(node, detached(value))
        return seen[key]

    inputs = map_leaves((args, kwargs), placeholder)
    containers = [(each, _items(each)) for each in _containers(inputs[0], *inputs[1].values())]
    try:
        with intercepted(module, tracer, attention_patch):
            output = forward(module, *inputs[0], **inputs[1])
            with tracer.paused():
                record_changes(tracer, path)
        tracer.graph.output(tracer.create_arg(output))
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"cannot capture the forward of {type(module).__name__} at {path or 'the root'}: "
            f"{type(error).__name__}: {error}\n  at {line_of(error)}\n"
            "A graph cannot hold what this line does. Rewrite the line, move it into a submodule "
            "of its own, or keep such a submodule whole with the is_leaf hook."
        ) from error
    finally:
        undo_changes(tracer)
    _refuse_leaks(tracer, path)
    for container, before in containers:
        _refuse_change(container, before, path)
    tracer.graph.lint()
    ambient: list[tuple[Callable[[], Any], Any]] = [
        (partial(ask, *args), answer) for (ask, args), answer in tracer.ambient.items()
    ]
    reads, parts = tracer.watcher.finish(), list(tracer.parts())
    return Captured(tracer.graph, tracer.branches, reads, parts, ambient)


def _containers(*given: Any) -> Iterator[Any]:
    """Yield the lists and dicts among arguments, nested ones included."""
    for x in given:
        if type(x) in (list, dict):
            yield x
        if type(x) in (tuple, list, dict):
            yield from _containers(*(x.values() if type(x) is dict else x))


def _items(container: Any) -> list[tuple[Any, Any]]:
    """Return the values of a list or dict with their positions or keys."""
    return list(container.items() if type(container) is dict else enumerate(container))


def _refuse_change(container: Any, before: list[tuple[Any, Any]], path: str) -> None:
    """Raise if the forward has changed a list or dict among its arguments.

    The graph takes such a container apart into its leaves, so the caller's own container would
    stay as it is.
    """
    now = _items(container)
    same = len(now) == len(before) and all(
        a == b and x is y for (a, x), (b, y) in zip(now, before, strict=True)
    )
    if not same:
        raise CaptureError(
            f"the forward at {path or 'the root'} changes a {type(container).__name__} among its "
            "arguments; a graph cannot do that. Pass an object with methods of its own, as caches "
            "are, return the new values, or keep that submodule whole with the is_leaf hook."
        )


def _refuse_leaks(tracer: Tracer, path: str) -> None:
    """Raise if the forward has stored a proxy on a module: it would outlive the capture."""
    for module in tracer.root.modules():
        for name, value in vars(module).items():
            if any_proxy(value):
                delattr(module, name)
                raise CaptureError(
                    f"the forward at {path or 'the root'} stores a tensor as attribute {name!r} of "
                    f"{type(module).__name__}; a graph cannot do that. Return the tensor instead, "
                    "or keep that submodule whole with the is_leaf hook."
                )
