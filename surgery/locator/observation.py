"""Record one run of a whole model as one flat ``torch.fx.Graph``.

The graph is for reading, not for running: its sizes are the numbers of this run. It shows what a
capture of one host cannot show: which modules a site spans, and who reads a site's output.

The observer sees a run in four places:

    __torch_function__        each torch function becomes a node
    nn.Module.__call__        the nodes made inside get the module as owner; afterwards the nodes of
                              a whole module are replaced by one, unless it holds an attention;
                              one stands beside those of a loop over experts
    attention functions       one node, whatever is computed inside
    autograd.Function.apply   one node, if its result is a softmax

A tensor is known by its ``id``. An id is unique only while its tensor lives, so the observer keeps
every tensor that it has seen until the run ends.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from surgery.interop import (
    AttentionPatch,
    LeftOnce,
    deliver,
    detached_copy,
    encoder_fastpath,
    evaluating,
    map_leaves,
    patched,
    snapshot,
    tensors_in,
    unspliced_forward,
    untouched,
)
from surgery.locator.idle_experts import is_routed, run_idle_experts
from surgery.locator.run_record import Call, Observation, floats_in, has_tensor, target_name, writes
from surgery.patterns import (
    PRODUCTS,
    expert_lists,
    is_whole,
    packs_weights,
    rows_sum_to_one,
    runs_experts,
    stacked_maps,
    stacks_weights,
    stays_whole,
)

_ATTENTION_OPS = ("softmax", "scaled_dot_product_attention", "multi_head_attention_forward")


class _Observer(LeftOnce, TorchFunctionMode):
    """Turns the operations of a run into nodes; see the top of this file.

    Attributes:
        nodes: the node of each tensor, by the tensor's id.
        owners, call_numbers: stacks of the paths and numbers of the module calls in progress.
        trail: the nodes in the order in which they were made.
        hidden: whether an attention function is running, whose inside is not recorded.
        own_gradient: whether an autograd function is running, whose gradient is its own.
    """

    def __init__(self, model: nn.Module, keeps_hook: Callable[[Any], bool]) -> None:
        super().__init__()
        self.keeps_hook = keeps_hook
        self.graph = fx.Graph()
        self.observation = Observation(self.graph)
        self.paths = {id(m): p for p, m in reversed(list(model.named_modules()))}
        self.paths[id(model)] = ""
        self.modules = dict(model.named_modules())
        self.parameters = {id(t): n for n, t in model.named_parameters()}
        self.parameters |= {id(t): n for n, t in model.named_buffers()}
        self.nodes: dict[int, fx.Node] = {}
        self.alive: list[Any] = []  # keeps ids unique
        self.owners = [""]
        self.call_numbers, self.n_calls = [0], 0
        self.trail: list[fx.Node] = []
        self.hidden = self.own_gradient = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        deliver()
        # Gradients are on in the run, so that a no_grad of the model's own shows; none is recorded.
        unrecorded = nullcontext() if func is torch._C._set_grad_enabled else torch.no_grad()
        with unrecorded:
            result = func(*args, **(kwargs or {}))
        read = func.__name__ in ("__get__", "size", "dim", "__len__")
        if not self.hidden and (not read or isinstance(result, Tensor)):
            self.record("call_function", func, args, kwargs or {}, result)
        return result

    def record(self, op: str, target: Any, args: Any, kwargs: Any, result: Any) -> fx.Node | None:
        """Add a node for an operation that gave ``result``; None if it gave no new tensor."""
        if target is torch.Tensor.__setitem__:
            result = args[0]
        if not has_tensor(result):
            return None
        if op == "call_function" and args and result is args[0] and not writes(target):
            return None  # such as a cast to the dtype that the tensor has already
        node = self.graph.create_node(op, target, self.named(args), self.named(kwargs))
        node.meta.update(value=result, owner=self.owners[-1], call=self.call_numbers[-1])
        self.alive.append(result)
        self.trail.append(node)
        if target is not torch.Tensor.__setitem__:
            self.define(node, result)
        return node

    def define(self, node: fx.Node, result: Any) -> None:
        """Make ``node`` the node of the tensor ``result``, or of the tensors in that tuple."""
        if isinstance(result, Tensor):
            self.nodes[id(result)] = node
        elif isinstance(result, (tuple, list)):
            for index, item in enumerate(result):
                if isinstance(item, Tensor):
                    part = self.graph.call_function(operator.getitem, (node, index))
                    part.meta.update(value=item, owner=self.owners[-1], call=self.call_numbers[-1])
                    self.trail.append(part)
                    self.nodes[id(item)] = part

    def named(self, structure: Any) -> Any:
        """Return ``structure`` with each tensor replaced by the node that made it."""
        if isinstance(structure, Tensor):
            return self.node_of(structure)
        if isinstance(structure, (tuple, list)):
            return tuple(self.named(x) for x in structure)
        if isinstance(structure, dict):
            return {str(k): self.named(v) for k, v in structure.items()}
        return None if isinstance(structure, nn.Module) else structure

    def node_of(self, tensor: Tensor) -> fx.Node:
        """Return the node of a tensor; an unknown one is a parameter, a buffer or an input."""
        node = self.nodes.get(id(tensor))
        if node is None:
            name = self.parameters.get(id(tensor))
            op = "placeholder" if name is None else "get_attr"
            node = self.graph.create_node(op, name or f"input_{len(self.nodes)}")
            node.meta.update(value=tensor, owner="", call=0)
            self.nodes[id(tensor)] = node
            self.alive.append(tensor)
            self.trail.append(node)
        return node

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the forward of a module in place of ``module(*args, **kwargs)``, and record it."""
        path = self.paths.get(id(module))
        if path is None or self.hidden:
            return unspliced_forward(module)(*args, **kwargs)
        if path not in self.observation.calls:
            self.observation.calls[path] = Call(*map_leaves((args, kwargs), snapshot))
        if not torch.is_grad_enabled() and not self.own_gradient:
            self.observation.without_gradient.add(path)
        start = len(self.trail)
        self.n_calls += 1
        self.owners.append(path)
        self.call_numbers.append(self.n_calls)
        try:
            result = unspliced_forward(module)(*args, **kwargs)
            inside = self.trail[start:]
            lists = expert_lists(module, path)
            if lists and not runs_experts(lists, inside, self.modules[""]):
                lists = {}
            routed = is_routed(self.observation.calls, lists, (args, kwargs))
            run_idle_experts(self.observation, lists, self.modules)
        finally:
            self.owners.pop()
            self.call_numbers.pop()
        self.observation.note_result(path, result, self.nodes)
        for hook in module._forward_hooks.values():
            if self.keeps_hook(hook):  # the model collects its outputs with this hook
                hook(module, args, result)
        if stacks_weights(module):
            stacks = stacked_maps(inside, self.modules[""])
            self.observation.stacks.setdefault(path, stacks)
        if has_tensor(result) and (is_whole(module, path) or stacks_weights(module)):
            self.collapse(start, path, args, kwargs, result)
        elif lists and ((path and self.keep_whole(path, args, kwargs, result, inside)) or routed):
            self.observation.experts.update(*lists.values())
        return result

    def keep_whole(
        self, path: str, args: Any, kwargs: Any, result: Any, inside: list[fx.Node]
    ) -> bool:
        """Let one node stand for a call with experts; False if it is no FFN. Its nodes stay."""
        given, made = (list(map(self.node_of, floats_in(x))) for x in ((args, kwargs), result))
        if not (given and made and stays_whole(inside, given[0], made[0], self.modules[""])):
            return False
        self.observation.mixtures.add(path)
        self.stand_for(path, args, kwargs, result).meta["inside"] = made
        return True

    def collapse(self, start: int, path: str, args: Any, kwargs: Any, result: Any) -> None:
        """Replace the nodes of a childless module, or of a block of experts, by one node.

        The nodes stay if they belong to an attention: if a softmax or an attention call is among
        them, or a product in a module without parameters.
        """
        end = len(self.trail)
        inside = self.trail[start:end]
        names = {target_name(node) for node in inside}
        module = self.modules[path]
        weightless = not packs_weights(module) and not any(True for _ in module.parameters())
        if not names.isdisjoint(_ATTENTION_OPS) or (weightless and not names.isdisjoint(PRODUCTS)):
            return
        self.stand_for(path, args, kwargs, result)
        self.erase(start, end)

    def stand_for(self, path: str, args: Any, kwargs: Any, result: Any) -> fx.Node:
        """Add a node that stands for the whole call of a module."""
        inputs = self.named(args), self.named(kwargs)
        node = self.graph.create_node("call_module", path, *inputs)
        node.meta.update(value=result, owner=self.owners[-1], call=self.call_numbers[-1])
        self.alive.append(result)
        self.trail.append(node)
        self.define(node, result)
        return node

    def erase(self, start: int, end: int) -> None:
        """Erase the nodes of this part of the trail that nothing reads, the last first."""
        for old in reversed(self.trail[start:end]):
            if not old.users and old.op not in ("placeholder", "get_attr"):
                self.graph.erase_node(old)
        self.trail[start:] = [n for n in self.trail[start:] if not n._erased]

    def attend(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap an attention function, so that each call of it is recorded as one node."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            was, self.hidden = self.hidden, True
            try:
                result = function(*args, **kwargs)
            finally:
                self.hidden = was
            if not self.hidden:
                node = self.record("call_function", function, args, kwargs, result)
                if node is not None:
                    node.meta.update(attention=True, module=args[0])
            return result

        return wrapped

    def apply(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``apply`` of an autograd function: one node if its result is a softmax."""

        def apply(*args: Any) -> Any:
            start = len(self.trail)
            was, self.own_gradient = self.own_gradient, True
            try:
                result = original(*args)
            finally:
                self.own_gradient = was
            if not self.hidden and rows_sum_to_one(result):
                self.erase(start, len(self.trail))
                self.record("call_function", apply, args, {}, result)
            return result

        return apply


def observe(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    attention_patch: AttentionPatch | None = None,
    keeps_hook: Callable[[Any], bool] = lambda hook: False,
) -> Observation:
    """Run ``model(*args, **kwargs)`` once in evaluation mode, and record the run.

    The model is left unchanged: no random number is drawn, no gradient is computed, and training
    flags and buffers are restored. A spliced model runs as it was before any splice.

    Args:
        attention_patch: replaces a library's choice of attention function, see ``AttentionPatch``.
        keeps_hook: whether a forward hook is part of the model. No other hook fires.
    """
    observer = _Observer(model, keeps_hook)

    def module_call(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda module, *args, **kwargs: observer.call(module, args, kwargs)

    replacements: list[Any] = [(nn.Module, "__call__", module_call)]
    replacements += encoder_fastpath.WITHOUT_FASTPATH
    replacements += [(torch.autograd.Function, "apply", observer.apply)]
    if attention_patch is not None:
        replacements += attention_patch(observer.attend)
    with evaluating(model), untouched(model), patched(*replacements), torch.enable_grad(), observer:
        args, kwargs = detached_copy((args, kwargs))
        output = model(*args, **kwargs)
    returned = {id(tensor) for tensor in tensors_in(output)}
    observer.observation.outputs = [n for key, n in observer.nodes.items() if key in returned]
    return observer.observation
