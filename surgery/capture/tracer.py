"""Trace a forward: make a node of each operation, and run it on the example values.

    create_proxy(kind, target, args, kwargs)
      run      the operation on the values beside the proxies, without gradient, unrecorded
      wrap     the new node and its value: a proxy, or the plain value where Python needs one

A module on the way to a site becomes the nodes of its own forward, between two nodes that run its
hooks (module_hooks.py); every other module becomes one node. Beside the nodes the tracer collects
what the graph relies on, see ``Captured`` (captured.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TracerBase

from surgery.capture.branches import Branch, is_pure, model_line, reads_opaque, user_line
from surgery.capture.module_hooks import run_forward_hooks, run_pre_hooks
from surgery.capture.proxy import CallableProxy, ValueProxy, any_proxy, is_proxy
from surgery.capture.records import is_own_kind, is_record, make_record, parts_of, unwrapped
from surgery.capture.text_proxy import TextProxy, structure_of, texts_in
from surgery.capture.watched_state import Watcher

IsLeaf = Callable[[nn.Module, str], bool | None]


class Tracer(TracerBase):
    """The state of one capture; ``root`` is the host."""

    def __init__(
        self, root: nn.Module, through: Iterable[str], is_leaf: IsLeaf | None, texts_are_read: bool
    ) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.root = root
        self.through = frozenset(through)
        self.is_leaf = is_leaf or (lambda module, path: None)
        named = list(root.named_modules(remove_duplicate=False))
        self.paths = {id(m): p for p, m in reversed(named)}
        self.paths[id(root)] = ""
        self.tensors = {id(t): n for n, t in _named_tensors(root)}
        self.root_node: fx.Node | None = None
        self.branches: list[Branch] = []
        self.asked: set[tuple[fx.Node, Any]] = set()
        self.texts_are_read = texts_are_read  # string arguments are no proxies
        self.texts: list[TextProxy] = []
        self.passed_to: set[Any] = {run_pre_hooks}  # kept whole, whatever string it is given
        self.saved_modes: list[fx.Node] = []  # gradient modes that the forward comes back to
        self.relied_on: set[str] = set()  # paths of modules that were traced through
        self.ambient: dict[tuple[Callable[..., Any], Any], Any] = {}
        self.owners = [""]  # paths of the modules whose forwards are running, innermost last
        self.executing = 0  # how many ``paused`` blocks are open
        # A tensor of a class of its own computes by its torch function, which stays on for it.
        plain = {type(t) for _, t in _named_tensors(root)} <= {Tensor, nn.Parameter, nn.Buffer}
        self.unseen: Any = torch._C.DisableTorchFunction if plain else nullcontext
        self.watcher = Watcher(lambda: bool(self.executing))

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
        """Make a node of an operation and run it; return what the forward gets for the result."""
        if kind != "call_module" and target not in self.passed_to:
            self.read_texts((args, kwargs))
        arguments, options = self.create_arg(args), self.create_arg(kwargs)
        value = self.run(kind, target, args, kwargs)
        node = self.graph.create_node(kind, target, arguments, options, name)
        return self.wrap(node, value)

    def wrap(self, node: fx.Node, value: Any) -> Any:
        """Return a proxy of ``node``, or ``value`` itself where Python may compare by ``is``."""
        node.meta.update(value=value, owner=self.owners[-1], line=model_line())
        if isinstance(value, (torch.dtype, torch.device, torch.layout, type, type(...))):
            return value
        if type(value) is str and node.op == "placeholder" and not self.texts_are_read:
            self.texts.append(TextProxy(node, self, value))
            return self.texts[-1]
        if type(value) in (bool, str):
            self.branch(node, type(value), value)
            return value
        if value is None:
            if is_pure(node):  # read from an input: in another call it may be a value
                self.branch(node, _is_none, True)
            return None
        if isinstance(value, nn.Module) and id(value) in self.paths:
            return value
        if isinstance(value, Tensor) and reads_opaque(node):  # may be None in another call
            self.branch(node, _is_none, False)
        return (CallableProxy if callable(value) else ValueProxy)(node, self, value)

    def run(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation on the example values."""
        args, kwargs = unwrapped(args), unwrapped(kwargs)
        with self.paused(), torch.no_grad():
            if kind == "call_module":
                return self.root.get_submodule(target).forward(*args, **kwargs)
            if kind == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            return target(*args, **kwargs)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside this block: the code in it runs for its value only."""
        self.executing += 1
        try:
            with self.unseen():
                yield
        finally:
            self.executing -= 1

    def create_arg(self, a: Any) -> Any:
        """Turn a value into an argument of a node; what fx cannot write becomes a node, too."""
        if is_proxy(a):
            return a.value if type(a) is TextProxy and (a.node, str) in self.asked else a.node
        if isinstance(a, nn.Module):
            return self.module_node(a)
        if isinstance(a, Tensor):
            return self.tensor_node(a)
        if type(a) is torch.Size:
            return tuple(a)
        if is_record(a):
            return self.record_node(a)
        if is_own_kind(a):
            return self.constant_node(a)
        try:
            return super().create_arg(a)
        except NotImplementedError:  # fx raises it for a constant that generated code cannot print
            return self.constant_node(a)

    def module_node(self, module: nn.Module) -> Any:
        """Return a node for a module: looked up below the host, or a constant if it is outside."""
        path = self.paths.get(id(module))
        if path is None:
            return self.constant_node(module)
        node = self.root_node
        assert node is not None
        for name in path.split(".") if path else ():
            node = self.graph.call_function(getattr, (node, name))
            node.meta.update(value=None, owner=self.owners[-1])
        return node

    def tensor_node(self, tensor: Tensor) -> fx.Node:
        """Return a node for a real tensor: parameters and buffers are looked up by name."""
        name = self.tensors.get(id(tensor))
        if name is None:
            return self.attribute_node(tensor)
        node = self.graph.create_node("get_attr", name)
        node.meta.update(value=tensor, owner=self.owners[-1])
        return node

    def attribute_node(self, tensor: Tensor) -> fx.Node:
        """Return a node that reads ``tensor`` from the object that has it as a plain attribute."""
        if id(tensor) not in self.watcher.tensors:
            return self.constant_node(tensor)
        owner, name = self.watcher.tensors[id(tensor)]  # no constant: it may be set again
        node = self.graph.call_function(getattr, (self.create_arg(owner), name))
        node.meta.update(value=tensor, owner=self.owners[-1])
        return node

    def record_node(self, record: Any) -> fx.Node:
        """Return a node that makes an object like this one, which holds proxies."""
        kind = self.constant_node(type(record))
        held, inside = map(self.create_arg, parts_of(record))
        node = self.graph.call_function(make_record, (kind, held, inside))
        node.meta.update(value=unwrapped(record), owner=self.owners[-1])
        return node

    def constant_node(self, value: Any) -> fx.Node:
        """Return a node for an object that generated code cannot print."""

        def constant() -> Any:
            return value

        node = self.graph.call_function(constant)
        node.meta.update(value=value, owner=self.owners[-1])
        return node

    def concrete(self, proxy: ValueProxy, convert: Callable[[Any], Any]) -> Any:
        """Return ``convert(value)`` of a proxy to Python, and record a branch."""
        with self.paused():
            value = convert(proxy.value)
        self.branch(proxy.node, convert, value)
        return value

    def read_texts(self, structure: Any) -> None:
        """Record a branch on the value of each string argument among nested values."""
        for text in texts_in(structure) if self.texts else ():
            self.concrete(text, str)

    def branch(self, node: fx.Node, convert: Callable[[Any], Any], expected: Any) -> None:
        """Record a branch; the same question about the same node is recorded once."""
        if (node, convert) not in self.asked:
            self.asked.add((node, convert))
            self.branches.append(Branch(node, convert, expected, user_line()))

    def ask(self, question: Callable[[], Any]) -> Callable[[], Any]:
        """Return ``question`` (gradient mode, autocast), recording the answers the model gets."""

        def answer(*args: Any) -> Any:
            value = question(*args)
            asker = sys._getframe(2).f_globals.get("__name__", "")  # 1 is the dispatcher
            if not self.executing and asker not in ("torch.autograd.grad_mode", __name__):
                self.ambient.setdefault((question, args), value)
            return value

        return answer

    def gradient_mode(self, mode: bool) -> None:
        """Record the beginning or the end of ``no_grad`` and its kin.

        Both only call ``_set_grad_enabled``; the call stack tells them apart. The mode to restore
        is known only when the graph runs: the node of the beginning returns it to that of the end.
        """
        frame = sys._getframe(1)
        steps = []  # innermost first: no_grad.__enter__ calls set_grad_enabled.__init__
        while frame := frame.f_back:  # type: ignore[assignment]
            if frame.f_globals.get("__name__") == "torch.autograd.grad_mode":
                steps.append((frame.f_code.co_name, frame.f_locals.get("self")))
            elif steps:
                break
        step, context = steps[-1] if steps else ("", None)
        ends = step == "__exit__" or (step == "__call__" and self.saved_modes)
        if step == "__enter__" and isinstance(context, torch.set_grad_enabled):
            return  # set_grad_enabled sets the mode in __init__ already
        if ends and self.saved_modes:
            node = self.graph.call_function(torch._C._set_grad_enabled, (self.saved_modes.pop(),))
        else:
            node = self.graph.call_function(enter_gradient_mode, (mode,))
            self.saved_modes.append(node)
        node.meta.update(value=None, owner=self.owners[-1])

    def call_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a module call: as one node, or as the nodes of the module's own forward."""
        path = self.paths.get(id(module))
        if self.executing or path is None:
            return module.forward(*args, **kwargs)
        if path not in self.through or self.is_leaf(module, path):
            output = self.create_proxy("call_module", path, args, kwargs)
            if is_proxy(output) and [*texts_in((args, kwargs))]:
                self.concrete(output, structure_of)  # what comes back may depend on a string
            return output
        self.read_texts([a for a in (*args, *kwargs.values()) if not _stays(a)])
        bound = self.create_proxy("call_function", run_pre_hooks, (module, args, kwargs), {})
        args = tuple(a if _stays(a) else bound[0][i] for i, a in enumerate(args))
        kwargs = {name: a if _stays(a) else bound[1][name] for name, a in kwargs.items()}
        self.relied_on.add(path)
        self.owners.append(path)
        try:
            output = module.forward(*args, **kwargs)
        finally:
            self.owners.pop()
        left = self.create_proxy("call_function", run_forward_hooks, (module, bound, output), {})
        return self.unpack(left)

    def unpack(self, proxy: Any) -> Any:
        """Return a proxy of a tuple as a tuple of proxies, and anything else as it is."""
        return tuple(proxy) if is_proxy(proxy) and type(proxy.value) is tuple else proxy

    def parts(self) -> Iterator[tuple[Any, str, nn.Module]]:
        """Yield ``Captured.parts``."""
        left = self.relied_on - {""}
        while left:
            parent, _, name = (path := left.pop()).rpartition(".")
            yield self.root.get_submodule(parent), name, self.root.get_submodule(path)
            left |= {parent} - {""}  # the parent may be replaced, too


def enter_gradient_mode(mode: bool) -> bool:
    """Set whether gradients are recorded, and return the mode before."""
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(mode)
    return before


def _stays(argument: Any) -> bool:
    """Whether no pre-hook may replace this argument: a constant or a string."""
    return type(argument) is TextProxy or not any_proxy(argument)


def _is_none(value: Any) -> bool:
    return value is None


def _named_tensors(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from root.named_buffers(remove_duplicate=False)
    yield from root.named_parameters(remove_duplicate=False)
