"""Capture: the forward of one module, run once on example values, becomes a ``torch.fx.Graph``.

    x --forward--> y         recorded as nodes        placeholder, call_module, call_function, ...

``torch.fx.symbolic_trace`` gives up on today's attention code: it asks proxies for their truth,
their length and their type. Here every proxy carries its value (see proxy.py), sizes stay nodes,
and the modules that are not on the way to a site stay whole.

Capture leaves no trace: it draws no random number, fires no hook, and works on copies of caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from torch import nn

from surgery.capture.guards import line_of
from surgery.capture.interception import intercepted
from surgery.capture.proxy import any_proxy, fixed
from surgery.capture.tracer import Captured, IsLeaf, Tracer
from surgery.errors import CaptureError
from surgery.interop import (
    AttentionPatch,
    capture_running,
    detached,
    identity,
    map_leaves,
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
        module: the host; its parameters and submodules are what the graph refers to.
        forward: an unbound forward of it.
        args, kwargs: example inputs, nested in tuples, lists and dicts. They are not changed.
        through: paths below ``module`` of the modules to trace through; others stay whole.
        attention_patch: how to keep a library's attention functions whole.
        path: where the host is in the model, for the error.
        is_leaf: says of a module whether it stays whole all the same (the plugins' hook).

    Returns:
        a graph whose placeholders are the host itself and then the leaves of ``(args, kwargs)``
        that ``values.leaves`` yields, in that order.

    Raises:
        CaptureError: the forward does something that a graph cannot hold; it names the line.
    """
    tracer = Tracer(module, through, is_leaf)
    with capture_running():
        return _capture(tracer, forward, args, kwargs, attention_patch, path)


def _capture(
    tracer: Tracer,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    attention_patch: AttentionPatch | None,
    path: str,
) -> Captured:
    module = tracer.root
    tracer.root_node = tracer.graph.placeholder("host")
    tracer.root_node.meta.update(value=None, owner="")
    seen: dict[int, Any] = {}

    def placeholder(value: Any) -> Any:
        key = identity(value, len(seen))
        if key not in seen:
            node = tracer.graph.placeholder(f"x{len(seen)}")
            node.meta["owner"] = ""
            seen[key] = tracer.wrap(node, detached(value))
        return seen[key]

    inputs = map_leaves((args, kwargs), placeholder)
    containers = [(held, _items(held)) for held in _containers(inputs[0], *inputs[1].values())]
    try:
        with intercepted(module, tracer, attention_patch):
            output = forward(module, *inputs[0], **inputs[1])
            tracer.graph.output(_output(tracer, output))
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"cannot capture the forward of {type(module).__name__} at {path or 'the root'}: "
            f"{type(error).__name__}: {error}\n  at {line_of(error)}\n"
            "The forward does something there that a graph cannot hold. Rewrite that line, move it "
            "into a submodule of its own, or keep such a submodule whole with the is_leaf hook."
        ) from error
    _refuse_leaks(tracer, path)
    for held, items in containers:
        _refuse_change(held, items, path)
    tracer.graph.lint()
    ambient: list[tuple[Callable[[], Any], Any]] = [
        (partial(ask, *args), answer) for (ask, args), answer in tracer.ambient.items()
    ]
    reads, parts = list(tracer.reads.values()), list(tracer.parts())
    return Captured(tracer.graph, tracer.guards, reads, parts, ambient)


def _output(tracer: Tracer, output: Any) -> Any:
    """The argument of the output node; a named tuple is built by a node of its own.

    ``fx`` of torch 2.11 prints the name of its class there, which the code does not know.
    """
    made = tracer.create_arg(output)
    if isinstance(made, tuple) and hasattr(made, "_fields"):
        made = tracer.graph.call_function(type(made), tuple(made))
        made.meta.update(value=fixed(output), owner="")
    return made


def _containers(*given: Any) -> Iterator[Any]:
    """The lists and dicts among arguments."""
    for x in given:
        if type(x) in (list, dict):
            yield x
        if type(x) in (tuple, list, dict):
            yield from _containers(*(x.values() if type(x) is dict else x))


def _items(held: Any) -> list[tuple[Any, Any]]:
    return list(held.items() if type(held) is dict else enumerate(held))


def _refuse_change(held: Any, items: list[tuple[Any, Any]], path: str) -> None:
    """A list or dict that the caller gave is another one in the graph: changes would be lost."""
    now = _items(held)
    same = len(now) == len(items) and all(
        a == b and x is y for (a, x), (b, y) in zip(now, items, strict=True)
    )
    if not same:
        raise CaptureError(
            f"the forward at {path or 'the root'} changes a {type(held).__name__} that it is "
            "given; a graph cannot do that. Give it an object with methods of its own, as caches "
            "are, return what is new, or keep that submodule whole with the is_leaf hook."
        )


def _refuse_leaks(tracer: Tracer, path: str) -> None:
    """A proxy that the forward stored on a module would outlive the capture."""
    for module in tracer.root.modules():
        for name, value in vars(module).items():
            if any_proxy(value):
                delattr(module, name)
                raise CaptureError(
                    f"the forward at {path or 'the root'} stores a tensor as attribute {name!r} of "
                    f"{type(module).__name__}; a graph cannot do that. Return the tensor instead, "
                    "or keep that submodule whole with the is_leaf hook."
                )
