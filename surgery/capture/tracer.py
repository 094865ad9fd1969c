"""The tracer: turns what a forward does with its example values into nodes of a graph.

Every operation becomes a node and runs on the values beside the proxies (proxy.py). Modules that
are not on the way to a site stay whole; those that are keep their hooks at their border.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TracerBase

from surgery.capture.guards import Guard, is_pure, reads_opaque, user_line
from surgery.capture.module_hooks import run_forward_hooks, run_pre_hooks
from surgery.capture.proxy import CallableProxy, ValueProxy, any_proxy, is_proxy, unwrapped

IsLeaf = Callable[[nn.Module, str], bool | None]


@dataclass
class Captured:
    """The graph of one forward, with what it relied on.

    Nodes carry ``meta["value"]`` (the example value) and ``meta["owner"]`` (the path, below the
    root, of the module whose forward made them).
    """

    graph: fx.Graph
    guards: list[Guard]
    reads: list[tuple[Any, str, Any]] = field(default_factory=list)
    parts: list[tuple[Any, str, nn.Module]] = field(default_factory=list)
    ambient: list[tuple[Callable[[], Any], Any]] = field(default_factory=list)


class Tracer(TracerBase):
    def __init__(
        self, root: nn.Module, through: Iterable[str], is_leaf: IsLeaf | None = None
    ) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.root = root
        self.through = frozenset(through)
        self.is_leaf = is_leaf or (lambda module, path: None)
        self.paths = {
            id(m): p for p, m in reversed(list(root.named_modules(remove_duplicate=False)))
        }
        self.paths[id(root)] = ""
        self.tensors = {id(t): n for n, t in _named_tensors(root)}
        self.fetched: dict[str, fx.Node] = {}
        self.root_node: fx.Node | None = None
        self.guards: list[Guard] = []
        self.guarded: set[tuple[fx.Node, Any]] = set()
        self.modes: list[fx.Node] = []  # gradient modes that the forward has left and comes back to
        self.reads: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        self.met: set[str] = set()  # paths of modules whose insides decided what was captured
        self.ambient: dict[tuple[Callable[..., Any], Any], Any] = {}
        self.owner = [""]
        self.executing = 0

    # -- nodes and their values -----------------------------------------------------------

    def create_proxy(
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
            if is_pure(node):  # read from an input: it may be something in another call
                self.guard(node, _is_none, True)
            return None
        if isinstance(value, nn.Module) and id(value) in self.paths:
            return value
        if isinstance(value, Tensor) and reads_opaque(node):  # None, perhaps, in another call
            self.guard(node, _is_none, False)
        return (CallableProxy if callable(value) else ValueProxy)(node, self, value)

    def run(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = unwrapped(args), unwrapped(kwargs)
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
        if is_proxy(a):
            return a.node
        if isinstance(a, nn.Module):
            return self.module_node(a)
        if isinstance(a, Tensor):
            return self.tensor_node(a)
        if type(a) is torch.Size:
            return tuple(a)
        if isinstance(a, (int, float)) and type(a) not in (int, float, bool):  # a numpy scalar
            return self.constant_node(a)
        if isinstance(a, tuple) and type(a) is not tuple and not hasattr(a, "_fields"):
            return self.constant_node(a)
        try:
            return super().create_arg(a)
        except NotImplementedError:  # fx's way to say that it cannot print such a constant
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
            return self.attribute_node(tensor)
        node = self.graph.create_node("get_attr", name)
        node.meta.update(value=tensor, owner=self.owner[-1])
        return node

    def attribute_node(self, tensor: Tensor) -> fx.Node:
        """A plain attribute of a module, which may be another tensor in the next call."""
        for module in self.root.modules():
            for name, value in vars(module).items():
                if value is tensor:
                    node = self.graph.call_function(getattr, (self.module_node(module), name))
                    node.meta.update(value=tensor, owner=self.owner[-1])
                    return node
        return self.constant_node(tensor)

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
        if (node, convert) not in self.guarded:
            self.guarded.add((node, convert))
            self.guards.append(Guard(node, convert, expected, user_line()))

    def ask(self, question: Callable[[], Any]) -> Callable[[], Any]:
        """Remember the answer of a question about the surroundings (gradient mode, autocast)."""

        def answer(*args: Any) -> Any:
            value = question(*args)
            asker = sys._getframe(2).f_globals.get("__name__", "")  # behind patching's wrapper
            if not self.executing and asker not in ("torch.autograd.grad_mode", __name__):
                self.ambient.setdefault((question, args), value)
            return value

        return answer

    def gradient_mode(self, mode: bool) -> None:
        """Record a ``no_grad`` and its end: what it goes back to is known only when it runs."""
        frame = sys._getframe(1)
        steps = []  # no_grad leaves by way of set_grad_enabled
        while frame := frame.f_back:  # type: ignore[assignment]
            if frame.f_globals.get("__name__") == "torch.autograd.grad_mode":
                steps.append((frame.f_code.co_name, frame.f_locals.get("self")))
            elif steps:
                break
        step, context = steps[-1] if steps else ("", None)
        ends = step == "__exit__" or (step == "__call__" and self.modes)
        if step == "__enter__" and isinstance(context, torch.set_grad_enabled):
            return  # it was set when the object was made
        if ends and self.modes:
            node = self.graph.call_function(torch._C._set_grad_enabled, (self.modes.pop(),))
        else:
            node = self.graph.call_function(enter_gradient_mode, (mode,))
            self.modes.append(node)
        node.meta.update(value=None, owner=self.owner[-1])

    # -- modules ---------------------------------------------------------------------------

    def call_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.paths.get(id(module))
        if self.executing or path is None:
            return module.forward(*args, **kwargs)
        if path not in self.through or self.is_leaf(module, path):
            return self.create_proxy("call_module", path, args, kwargs)
        bound = self.create_proxy("call_function", run_pre_hooks, (module, args, kwargs), {})
        args = tuple(bound[0][i] if any_proxy(a) else a for i, a in enumerate(args))
        kwargs = {name: bound[1][name] if any_proxy(a) else a for name, a in kwargs.items()}
        self.met.add(path)
        self.owner.append(path)
        try:
            output = module.forward(*args, **kwargs)
        finally:
            self.owner.pop()
        return self.unpack(
            self.create_proxy("call_function", run_forward_hooks, (module, bound, output), {})
        )

    def unpack(self, proxy: Any) -> Any:
        return tuple(proxy) if is_proxy(proxy) and type(proxy.value) is tuple else proxy

    def read(self, owner: Any, name: str, value: Any) -> None:
        """Note that a plain attribute of a module, or of its config, decided what was captured."""
        if not self.executing:
            self.reads.setdefault((id(owner), name), (owner, name, value))
            self.met.add(self.paths.get(id(owner), ""))

    def parts(self) -> Iterator[tuple[Any, str, nn.Module]]:
        """Where these modules, and those above them, are held: ``(parent, name, module)``."""
        left = self.met - {""}
        while left:
            parent, _, name = (path := left.pop()).rpartition(".")
            yield self.root.get_submodule(parent), name, self.root.get_submodule(path)
            left |= {parent} - {""}  # what holds it may be replaced, too


def enter_gradient_mode(mode: bool) -> bool:
    """Set whether gradients are recorded; what it was before."""
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(mode)
    return before


def _is_none(value: Any) -> bool:
    return value is None


def _named_tensors(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from root.named_buffers(remove_duplicate=False)
    yield from root.named_parameters(remove_duplicate=False)
