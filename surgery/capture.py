"""Capture: the forward of one module, run once on example values, becomes a ``torch.fx.Graph``.

    x --forward--> y         recorded as nodes        placeholder, call_module, call_function, ...

``torch.fx.symbolic_trace`` gives up on today's attention code: it asks proxies for their truth,
their length and their type. Here every proxy carries its value (see proxy.py), sizes stay nodes,
and the modules that are not on the way to a site stay whole.

Capture leaves no trace: it draws no random number, fires no hook, and works on copies of caches.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import nn

from surgery import fastpath
from surgery.errors import CaptureError
from surgery.guards import MATH, line_of
from surgery.patching import patched
from surgery.proxy import any_proxy, apply, call
from surgery.quiet import capture_running, untouched
from surgery.recorder import Recorder
from surgery.tracer import AttentionPatch, Captured, IsLeaf, Tracer
from surgery.values import detached, identity, map_leaves

# Torch's parser looks at arguments before it asks them: a proxy must not get that far.
_FUNCTIONS = sorted(
    name
    for name in dir(torch._C._VariableFunctions)
    if not name.startswith("_") and callable(vars(torch).get(name))
)
# Methods that read sizes before they look whether an argument is a proxy.
_SIZED = "expand view reshape repeat permute new_zeros new_ones new_empty new_full".split()


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
        with _quiet(module, tracer, attention_patch):
            output = forward(module, *inputs[0], **inputs[1])
            tracer.graph.output(tracer.create_arg(output))
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


@contextmanager
def _quiet(
    module: nn.Module, tracer: Tracer, attention_patch: AttentionPatch | None
) -> Iterator[None]:
    """Everything that must be in place while a forward is captured; it leaves no trace."""

    def leaf(function: Callable[..., Any]) -> Callable[..., Any]:
        def attend(*args: Any, **kwargs: Any) -> Any:
            if tracer.executing:
                return function(*args, **kwargs)
            result = tracer.create_proxy("call_function", function, args, kwargs)
            result.node.meta["attention"] = True
            return tracer.unpack(result)

        return attend

    def recorded(kind: str, target: Any = None) -> Callable[..., Any]:
        """Replace a function by one that makes a node if a proxy is among its arguments."""

        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                if not tracer.executing and any_proxy((args, kwargs)):
                    return tracer.create_proxy(kind, target or original, args, kwargs)
                return original(*args, **kwargs)

            return run

        return make

    def module_call(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda mod, *args, **kwargs: tracer.call_module(mod, args, kwargs)

    def attribute(original: Callable[..., Any]) -> Callable[..., Any]:
        def read(owner: Any, name: str) -> Any:
            value = original(owner, name)
            if _decides(value):
                if id(owner) in known and name in vars(owner):
                    tracer.read(owner, name, value)
            return value

        return read

    configs = {id(c): c for m in module.modules() for c in vars(m).values() if _is_config(c)}
    known = {*tracer.paths, *configs}
    replacements: list[Any] = [(nn.Module, "__call__", module_call)]
    replacements += [(nn.Module, "__getattribute__", attribute), *fastpath.OPEN]
    classes = dict.fromkeys(type(config) for config in configs.values())
    replacements += [(each, "__getattribute__", attribute) for each in classes]
    replacements += [(torch, name, recorded("call_function")) for name in _FUNCTIONS]
    replacements += [(math, name, recorded("call_function")) for name in MATH]
    replacements += [(torch.Tensor, name, recorded("call_method", name)) for name in _SIZED]
    replacements += [(torch.jit.ScriptFunction, "__call__", recorded("call_function", call))]
    replacements += [(torch.autograd.Function, "apply", recorded("call_function", apply))]
    replacements += [
        (torch, name, tracer.ask) for name in ("is_grad_enabled", "is_autocast_enabled")
    ]
    if attention_patch is not None:
        replacements += attention_patch(leaf)
    with untouched(module), patched(*replacements), Recorder(tracer):
        yield


def _decides(value: Any) -> bool:
    """Is an attribute of this value looked at while capturing, rather than computed with?"""
    if type(value) is tuple:
        return all(map(_decides, value))
    plain = (bool, int, float, str, torch.dtype, types.FunctionType, types.BuiltinFunctionType)
    return value is None or type(value) in plain or isinstance(value, Enum)


def _is_config(x: Any) -> bool:
    """A plain object that holds settings: its attributes are read in a forward, not called."""
    written_in_python = type(x).__flags__ & (1 << 9) and not type(x).__flags__ & (1 << 8)
    other = isinstance(x, (nn.Module, torch.Tensor, type)) or callable(x)
    return bool(written_in_python) and hasattr(x, "__dict__") and not other


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
