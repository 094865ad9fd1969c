"""Capture: the forward of one module, run once on example values, becomes a ``torch.fx.Graph``.

    x --forward--> y         recorded as nodes        placeholder, call_module, call_function, ...

``torch.fx.symbolic_trace`` gives up on today's attention code: it asks proxies for their truth,
their length and their type. Here every proxy carries its value (see proxy.py), sizes stay nodes,
and the modules that are not on the way to a site stay whole.

Capture leaves no trace: it draws no random number, fires no hook, and works on copies of caches.
"""

from __future__ import annotations

import copy
import math
import operator
import random
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TracerBase
from torch.overrides import TorchFunctionMode

from surgery.errors import CaptureError
from surgery.patching import patched
from surgery.proxy import ValueProxy, fixed

# Something that replaces the choice of attention function: takes ``wrap(function) -> function``,
# gives replacements for ``patched``. huggingface.py has one for transformers' registry.
AttentionPatch = Callable[[Callable[[Callable[..., Any]], Callable[..., Any]]], list[Any]]

_FACTORIES = (
    "arange empty zeros ones full rand randn randint randperm tensor as_tensor scalar_tensor "
    "linspace eye tril_indices triu_indices"
).split()
_MATH = "sqrt ceil floor log log2 prod gcd exp pow trunc".split()
_PURE_METHODS = ("size", "dim", "numel", "get", "keys", "values", "items", "stride")
_PURE = {getattr, operator.getitem, operator.contains, len, isinstance, min, max, sum, round}
_PURE |= {getattr(operator, n) for n in "eq ne lt le gt ge add sub mul floordiv truediv mod".split()}
_PURE |= {getattr(operator, n) for n in "neg pos not_ and_ or_ pow".split()}
_PURE |= {getattr(math, n) for n in _MATH}


_current = threading.local()


@dataclass
class Guard:
    """An answer that Python got while capturing: ``convert(node) == expected``."""

    node: fx.Node
    convert: Callable[[Any], Any]
    expected: Any
    where: str


@dataclass
class Captured:
    """The graph of one forward, with what it relied on.

    Nodes carry ``meta["value"]`` (the example value) and ``meta["owner"]`` (the path, below the
    root, of the module whose forward made them).
    """

    graph: fx.Graph
    guards: list[Guard]
    reads: list[tuple[nn.Module, str, Any]] = field(default_factory=list)
    ambient: list[tuple[Callable[[], Any], Any]] = field(default_factory=list)


class _Tracer(TracerBase):
    def __init__(self, root: nn.Module, through: Iterable[str]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.root = root
        self.through = frozenset(through)
        self.paths = {id(m): p for p, m in reversed(list(root.named_modules(remove_duplicate=False)))}
        self.paths[id(root)] = ""
        self.tensors = {id(t): n for n, t in _named_tensors(root)}
        self.fetched: dict[str, fx.Node] = {}
        self.root_node: fx.Node | None = None
        self.guards: list[Guard] = []
        self.guarded: set[fx.Node] = set()
        self.reads: dict[tuple[int, str], tuple[nn.Module, str, Any]] = {}
        self.ambient: dict[Callable[[], Any], Any] = {}
        self.owner = [""]
        self.executing = 0

    # -- nodes and their values -----------------------------------------------------------

    def create_proxy(  # type: ignore[override]
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
        proxy_factory_fn: Any = None,
    ) -> Any:
        arguments, options = self.create_arg(args), self.create_arg(kwargs)
        value = self.run(kind, target, args, kwargs)
        node = self.graph.create_node(kind, target, arguments, options, name)
        return self.wrap(node, value)

    def wrap(self, node: fx.Node, value: Any) -> Any:
        node.meta.update(value=value, owner=self.owner[-1])
        if isinstance(value, (torch.dtype, torch.device, torch.layout, type, type(...))):
            return value
        if type(value) in (bool, str):  # also compared by ``is``: only the plain value will do
            self.guard(node, type(value), value)
            return value
        if value is None:
            if node.target in (getattr, operator.getitem, "get"):
                self.guard(node, _is_none, True)
            return None
        if isinstance(value, nn.Module) and id(value) in self.paths:
            return value
        return ValueProxy(node, self, value)

    def run(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = fixed(args), fixed(kwargs)
        with self.paused(), torch.no_grad():
            if kind == "call_module":
                return self.root.get_submodule(target).forward(*args, **kwargs)
            if kind == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            return target(*args, **kwargs)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run code for its value only: nothing that it does is recorded."""
        self.executing += 1
        try:
            with torch._C.DisableTorchFunction():
                yield
        finally:
            self.executing -= 1

    def create_arg(self, a: Any) -> Any:
        if type(a) is ValueProxy:
            return a.node
        if isinstance(a, nn.Module):
            return self.module_node(a)
        if isinstance(a, Tensor):
            return self.tensor_node(a)
        if isinstance(a, tuple) and type(a) not in (tuple, torch.Size) and not hasattr(a, "_fields"):
            return self.constant_node(a)
        if type(a) is torch.Size:
            return tuple(a)
        try:
            return super().create_arg(a)
        except NotImplementedError:
            return self.constant_node(a)

    def module_node(self, module: nn.Module) -> Any:
        path = self.paths.get(id(module))
        if path is None:
            return self.constant_node(module)
        node = self.root_node
        assert node is not None
        for name in path.split(".") if path else ():
            node = self.graph.call_function(getattr, (node, name))
            node.meta.update(value=None, owner=self.owner[-1])
        return node

    def tensor_node(self, tensor: Tensor) -> fx.Node:
        name = self.tensors.get(id(tensor))
        if name is None:
            return self.constant_node(tensor)
        node = self.graph.create_node("get_attr", name)
        node.meta.update(value=tensor, owner=self.owner[-1])
        return node

    def constant_node(self, value: Any) -> fx.Node:
        def constant() -> Any:
            return value

        node = self.graph.call_function(constant)
        node.meta.update(value=value, owner=self.owner[-1])
        return node

    # -- answers ---------------------------------------------------------------------------

    def concrete(self, proxy: ValueProxy, convert: Callable[[Any], Any]) -> Any:
        with self.paused():
            value = convert(proxy.value)
        self.guard(proxy.node, convert, value)
        return value

    def guard(self, node: fx.Node, convert: Callable[[Any], Any], expected: Any) -> None:
        if node not in self.guarded:
            self.guarded.add(node)
            self.guards.append(Guard(node, convert, expected, _user_line()))

    def ask(self, question: Callable[[], Any]) -> Callable[[], Any]:
        """Remember the answer of a question about the surroundings (gradient mode, autocast)."""

        def answer(*args: Any) -> Any:
            value = question(*args)
            if not self.executing:
                self.ambient[lambda: question(*args)] = value
            return value

        return answer

    # -- modules ---------------------------------------------------------------------------

    def call_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.paths.get(id(module))
        if self.executing or path is None:
            return module.forward(*args, **kwargs)
        if path not in self.through:
            return self.create_proxy("call_module", path, args, kwargs)
        bound = self.create_proxy("call_function", before, (module, args, kwargs), {})
        args = tuple(bound[0][i] for i in range(len(args)))
        kwargs = {name: bound[1][name] for name in kwargs}
        self.owner.append(path)
        try:
            output = module.forward(*args, **kwargs)
        finally:
            self.owner.pop()
        return self.unpack(self.create_proxy("call_function", after, (module, bound, output), {}))

    def unpack(self, proxy: Any) -> Any:
        return tuple(proxy) if type(proxy) is ValueProxy and type(proxy.value) is tuple else proxy

    def read(self, module: nn.Module, name: str, value: Any) -> None:
        """Note that a plain attribute of a module decided what was captured."""
        if not self.executing and id(module) in self.paths:
            self.reads.setdefault((id(module), name), (module, name, value))


class _Recorder(TorchFunctionMode):
    """Turns torch calls that no proxy takes part in (factories, parameters) into nodes too."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tracer = self.tracer
        if tracer.executing:
            return func(*args, **kwargs)
        if not _any_proxy((args, kwargs)):
            with torch._C.DisableTorchFunction(), torch.no_grad():
                if func.__name__ == "__get__" or func.__name__ in ("__repr__", "__format__"):
                    return func(*args, **kwargs)
            if func.__name__ in ("size", "dim", "numel", "is_floating_point", "get_device"):
                return func(*args, **kwargs)
        if func.__name__ == "__get__":  # a property: Tensor.shape, Tensor.mT, ...
            return getattr(args[0], func.__self__.__name__)
        if torch.overrides.is_tensor_method_or_property(func):
            if func.__name__ == "__setitem__":
                return tracer.create_proxy("call_function", operator.setitem, args, kwargs)
            if func.__name__ == "__getitem__":
                return tracer.create_proxy("call_function", operator.getitem, args, kwargs)
            return tracer.create_proxy("call_method", func.__name__, args, kwargs)
        return tracer.create_proxy("call_function", func, args, kwargs)


def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Run the forward pre-hooks of a module that the graph passes through."""
    if capturing():
        return args, kwargs
    for key, hook in module._forward_pre_hooks.items():
        if key in module._forward_pre_hooks_with_kwargs:
            changed = hook(module, args, kwargs)  # type: ignore[call-arg]
            args, kwargs = (args, kwargs) if changed is None else changed
        else:
            changed = hook(module, args)
            if changed is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
    return args, kwargs


def after(module: nn.Module, bound: tuple[Any, Any], output: Any) -> Any:
    """Run the forward hooks of a module that the graph passes through."""
    if capturing():
        return output
    for key, hook in module._forward_hooks.items():
        if key in module._forward_hooks_with_kwargs:
            changed = hook(module, *bound, output)  # type: ignore[call-arg]
        else:
            changed = hook(module, bound[0], output)
        output = output if changed is None else changed
    return output


def capture(
    module: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    through: Iterable[str] = (),
    attention_patch: AttentionPatch | None = None,
    path: str = "",
) -> Captured:
    """Capture ``forward(module, *args, **kwargs)`` as a graph.

    Args:
        module: the host; its parameters and submodules are what the graph refers to.
        forward: an unbound forward of it.
        args, kwargs: example inputs, nested in tuples, lists and dicts. They are not changed.
        through: paths below ``module`` of the modules to trace through; others stay whole.
        attention_patch: how to keep a library's attention functions whole.
        path: where the host is in the model, for the error.

    Returns:
        a graph whose placeholders are the host itself and then the leaves of ``(args, kwargs)``
        that :func:`leaves` yields, in that order.

    Raises:
        CaptureError: the forward does something that a graph cannot hold; it names the line.
    """
    tracer = _Tracer(module, through)
    previous, _current.capturing = capturing(), True
    try:
        return _capture(tracer, forward, args, kwargs, attention_patch, path)
    finally:
        _current.capturing = previous


@contextmanager
def silenced(module: nn.Module) -> Iterator[None]:
    """Run forwards for their values only: no hook fires, no random state moves."""

    def bare(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda mod, *args, **kwargs: mod.forward(*args, **kwargs)

    previous, _current.capturing = capturing(), True
    try:
        with quiet_random(module), patched((nn.Module, "__call__", bare)):
            yield
    finally:
        _current.capturing = previous


def capturing() -> bool:
    """Is this thread capturing? Then hosts inside what is kept whole run their own forward."""
    return getattr(_current, "capturing", False)


def _capture(
    tracer: _Tracer,
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
        key = _identity(value, len(seen))
        if key not in seen:
            node = tracer.graph.placeholder(f"x{len(seen)}")
            node.meta["owner"] = ""
            seen[key] = tracer.wrap(node, detached(value))
        return seen[key]

    inputs = map_leaves((args, kwargs), placeholder)
    try:
        with _quiet(module, tracer, attention_patch):
            output = forward(module, *inputs[0], **inputs[1])
            tracer.graph.output(tracer.create_arg(output))
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"cannot capture the forward of {type(module).__name__} at {path or 'the root'}: "
            f"{type(error).__name__}: {error}\n  at {_line_of(error)}\n"
            "The forward does something there that a graph cannot hold. Rewrite that line, move it "
            "into a submodule of its own, or keep such a submodule whole with the is_leaf hook."
        ) from error
    _refuse_leaks(tracer, path)
    tracer.graph.lint()
    ambient = list(tracer.ambient.items())
    return Captured(tracer.graph, tracer.guards, list(tracer.reads.values()), ambient)


def leaves(structure: Any) -> list[Any]:
    """The inputs of a graph: numbers, and tensors and opaque objects once each, in order."""
    found: dict[Any, Any] = {}
    map_leaves(structure, lambda v: found.setdefault(_identity(v, len(found)), v))
    return list(found.values())


def _identity(value: Any, position: int) -> Any:
    """Two numbers that are equal by chance are two inputs; one tensor given twice is one."""
    return ("number", position) if isinstance(value, (int, float)) else id(value)


def map_leaves(structure: Any, function: Callable[[Any], Any]) -> Any:
    """Apply ``function`` to the leaves of nested tuples, lists and dicts; keep constants."""
    if structure is None or isinstance(structure, (bool, str, torch.dtype, torch.device, type)):
        return structure
    if type(structure) in (tuple, list):
        return type(structure)(map_leaves(x, function) for x in structure)
    if type(structure) is dict:
        return {k: map_leaves(v, function) for k, v in structure.items()}
    return function(structure)


@contextmanager
def _quiet(
    module: nn.Module, tracer: _Tracer, attention_patch: AttentionPatch | None
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

    def factory(original: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> Any:
            if not tracer.executing and _any_proxy((args, kwargs)):
                return tracer.create_proxy("call_function", original, args, kwargs)
            return original(*args, **kwargs)

        return make

    def module_call(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda mod, *args, **kwargs: tracer.call_module(mod, args, kwargs)

    def attribute(original: Callable[..., Any]) -> Callable[..., Any]:
        def read(mod: nn.Module, name: str) -> Any:
            value = original(mod, name)
            if value is None or type(value) in (bool, int, float, str):
                tracer.read(mod, name, value)
            return value

        return read

    replacements: list[Any] = [(nn.Module, "__call__", module_call)]
    replacements += [(nn.Module, "__getattribute__", attribute)]
    replacements += [(torch, name, factory) for name in _FACTORIES]
    replacements += [(math, name, factory) for name in _MATH]
    replacements += [
        (torch, name, tracer.ask) for name in ("is_grad_enabled", "is_autocast_enabled")
    ]
    if attention_patch is not None:
        replacements += attention_patch(leaf)
    with quiet_random(module), patched(*replacements), _Recorder(tracer):
        yield


@contextmanager
def quiet_random(module: nn.Module) -> Iterator[None]:
    """Leave the random state of Python, the CPU and the devices of ``module`` as it was."""
    devices = {p.device for p in module.parameters() if p.device.type not in ("cpu", "meta")}
    state = random.getstate()
    kinds = {d.type for d in devices}
    try:
        with torch.random.fork_rng(sorted(d.index or 0 for d in devices), device_type=kinds.pop() if kinds else "cuda"):
            yield
    finally:
        random.setstate(state)


def detached(value: Any) -> Any:
    """An example value that can be worked on: tensors without history, opaque objects copied."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (int, float)):
        return value
    history = {id(t): t.detach() for t in tensors_in(value) if not t.is_leaf}
    with torch.no_grad():  # deepcopy refuses tensors with history
        return copy.deepcopy(value, history)


def detached_copy(structure: Any) -> Any:
    """:func:`detached` for nested arguments; an object that is given twice stays one object."""
    copies: dict[int, Any] = {}

    def copied(v: Any) -> Any:
        if isinstance(v, (int, float)):
            return v
        if id(v) not in copies:
            copies[id(v)] = detached(v)
        return copies[id(v)]

    return map_leaves(structure, copied)


def snapshot(value: Any) -> Any:
    """An opaque object as it is now, sharing its tensors: what a cache held at this moment."""
    if isinstance(value, (Tensor, int, float, nn.Module)) or callable(value):
        return value
    return copy.deepcopy(value, {id(t): t for t in tensors_in(value)})


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors inside an opaque object."""
    seen: set[int] = set()
    stack = [value]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif hasattr(item, "__dict__") and not isinstance(item, (type, nn.Module)):
            stack.extend(vars(item).values())


def _any_proxy(structure: Any) -> bool:
    if type(structure) is ValueProxy:
        return True
    if isinstance(structure, (tuple, list)):
        return any(_any_proxy(x) for x in structure)
    if isinstance(structure, dict):
        return any(_any_proxy(x) for x in structure.values())
    if isinstance(structure, slice):
        return any(_any_proxy(x) for x in (structure.start, structure.stop, structure.step))
    return False


def _is_none(value: Any) -> bool:
    return value is None


def _named_tensors(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from root.named_buffers(remove_duplicate=False)
    yield from root.named_parameters(remove_duplicate=False)


def _refuse_leaks(tracer: _Tracer, path: str) -> None:
    """A proxy that the forward stored on a module would outlive the capture."""
    for module in tracer.root.modules():
        for name, value in vars(module).items():
            if _any_proxy(value):
                delattr(module, name)
                raise CaptureError(
                    f"the forward at {path or 'the root'} stores a tensor as attribute {name!r} of "
                    f"{type(module).__name__}; a graph cannot do that. Return the tensor instead, "
                    "or keep that submodule whole with the is_leaf hook."
                )


def is_pure(node: fx.Node) -> bool:
    """May this node be evaluated before the graph runs: no tensor work, no side effect?"""
    if node.op == "placeholder":
        return True
    if isinstance(node.meta.get("value"), Tensor):
        return False
    if node.op == "call_method":
        name = str(node.target)
        return name in _PURE_METHODS or name.startswith(("get_", "is_", "has_"))
    return node.op == "call_function" and (
        node.target in _PURE or getattr(node.target, "__name__", "") == "constant"
    )


def _user_line() -> str:
    """File and line of the model code that is running now."""
    for frame in reversed(traceback.extract_stack()):
        if not _internal(frame.filename):
            return f"{frame.filename}:{frame.lineno} ({frame.line})"
    return "an unknown line"


def _line_of(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _internal(f.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else "?"


def _internal(filename: str) -> bool:
    name = filename.replace("\\", "/")
    here = __file__.replace("\\", "/").rsplit("/", 1)[0] + "/"
    return name.startswith(here) or "/torch/" in name or name.startswith("<")
