"""Keep virtual keys as the first entries of a KV cache while a model decodes without gradients.

    before    K, V = cache.update(k, v, i)
              context, lse = attention(q, K, V, mask)
              module(merged, q, lse)                     a second attention, and a merge

    after     K, V, mask, led = update_led_(cache, k, v, i, module, q, mask)
              context, lse = attend(led, q, K, V, mask)  over [virtual keys ; cache], if led
              unless_led(led, module, merged, q, lse)    merged itself, if led

A pass over a graph whose edits are all made (apply.py), for a module that is a ``LeadsCache``. A
softmax over all keys at once is what the module computes, so outputs differ by rounding alone. Each
call decides: one query, a cache that grows by concatenation, and no gradient. Every other call runs
as before.

The cache stays what it is. ``layer.keys`` is a view of the keys behind the virtual ones, and
remembers the whole (:class:`Led`). Lengths, masks and positions are those of the base. Whoever puts
other keys there, as beam search, a crop or a call without the method does, drops the memory with
the view, and the next token concatenates the virtual keys anew. So does a token after the module
returned others, after they were written to, and after :func:`forget_leading`.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from surgery.attention import transformed
from surgery.interop import huggingface
from surgery.patterns import value
from surgery.plugin import LeadsCache
from surgery.rewrite.lse import lse_of, output_of
from surgery.rewrite.nodes import has_hooks, put

Pair = tuple[Tensor, Tensor]

_epochs = itertools.count(1)
_epoch = 0


def forget_leading() -> None:
    """Let no cache go on with the virtual keys that it holds: they are read from modules again."""
    global _epoch
    _epoch = next(_epochs)


def leading_epoch() -> int:
    """Return a number that :func:`forget_leading` changes."""
    return _epoch


class Led(NamedTuple):
    """What ``layer.keys`` remembers: the whole that it is a view of, and whose keys come first."""

    keys: Tensor
    values: Tensor
    front: Pair
    state: tuple[int, ...]


def lead_caches(graph: fx.Graph, root: nn.Module) -> None:
    """Rewrite a graph in place, at each module whose virtual keys may lead the cache."""
    for node in graph.find_nodes(op="call_module"):
        if isinstance(root.get_submodule(node.target), LeadsCache):
            _lead(graph, node)


def update_led_(
    cache: Any, k: Tensor, v: Tensor, index: int, module: Any, query: Tensor, mask: Any
) -> tuple[Tensor, Tensor, Any, bool]:
    """Update a cache; return keys, values and mask for the attention call, and whether it is led.

    Shape: k, v (B, G, 1, d), query (B, H, 1, d), mask (B or 1, 1 or H, 1, m) or None
        -> (B, G, P + m, d) twice and (..., 1, P + m), if led
    """
    front = _front(k, module, query)
    layer = None if front is None else huggingface.growing_layer(cache, index)
    if front is None or layer is None:
        return *cache.update(k, v, index), mask, False
    before, length, state = layer.keys, front[0].shape[1], _state(front)
    led: Any = getattr(before, "_surgery_led", None)
    known = led is not None and led.front is front and led.state == state
    known = known and getattr(layer.values, "_surgery_led", None) is led
    if not _fits(mask, before.shape[-2] + 1) or not (known or _alike(front, k, v)):
        return *cache.update(k, v, index), mask, False
    if known:
        keys, values = torch.cat((led.keys, k), -2), torch.cat((led.values, v), -2)
    else:
        keys, values = (x.expand(len(k), -1, -1, -1) for x in front)
        keys = torch.cat((keys, before, k), -2)
        values = torch.cat((values, layer.values, v), -2)
    m = keys.shape[-2] - length
    layer.keys, layer.values = keys.narrow(-2, length, m), values.narrow(-2, length, m)
    layer.keys._surgery_led = layer.values._surgery_led = Led(keys, values, front, state)
    return keys, values, _longer(mask, length), True


def plainly_if_led(function: Any) -> Callable[..., tuple[Any, Any]]:
    """Return a function that calls the library's own attention function where no lse is needed."""

    def attend(led: bool, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return (plain(*args, **kwargs), None) if led else function(*args, **kwargs)

    plain = function.plain
    attend.__name__ = f"{function.__name__}_unless_led"
    return attend


def unless_led(led: bool, module: Any, merged: Tensor, *reads: Tensor) -> Tensor:
    """Return ``merged`` if the attention call has seen the virtual keys, else add them now."""
    if led:
        return merged
    made: Tensor = module(merged, *reads)
    return made


def _front(k: Tensor, module: Any, query: Tensor) -> Pair | None:
    """Return the virtual keys and values that may lead this call's cache."""
    if torch.is_grad_enabled() or k.shape[-2] != 1 or query.shape[-2] != 1 or module.training:
        return None
    if torch.compiler.is_compiling() or transformed() or has_hooks(module):
        return None
    found: Pair | None = module.leading_keys()
    return found


def _alike(front: Pair, *own: Tensor) -> bool:
    """Whether virtual keys and values can be concatenated with the model's own."""
    for x, y in zip(front, own, strict=True):
        shape = (y.shape[1], y.shape[3])
        if (x.shape[0], x.shape[2]) != shape or x.dtype != y.dtype or x.device != y.device:
            return False
        if x.is_inference() and isinstance(x, nn.Parameter):  # a write to it leaves no trace
            return False
    return True


def _state(front: Pair) -> tuple[int, ...]:
    """Return what changes with each write to the virtual keys that torch counts."""
    keys, values = front
    if keys.is_inference() or values.is_inference():
        return _epoch, keys.data_ptr(), values.data_ptr()
    return _epoch, keys.data_ptr(), values.data_ptr(), keys._version, values._version


def _fits(mask: Any, m: int) -> bool:
    """Whether a mask is none, or has one entry for each of the m keys of one query."""
    if mask is None:
        return True
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-2:] != (1, m):
        return False
    return mask.dtype == torch.bool or mask.is_floating_point()


def _longer(mask: Any, length: int) -> Any:
    """Return a mask that shows ``length`` keys more, in front; layers that share one share both."""
    if mask is None:
        return None
    if mask.is_inference():
        return _padded(mask, length)
    stamp = (length, mask._version)
    before, made = getattr(mask, "_surgery_longer", (None, None))
    if before != stamp:
        made = _padded(mask, length)
        mask._surgery_longer = stamp, made
    return made


def _padded(mask: Tensor, length: int) -> Tensor:
    shown = True if mask.dtype == torch.bool else 0.0
    return torch.cat([mask.new_full((*mask.shape[:-1], length), shown), mask], -1)


def _lead(graph: fx.Graph, node: fx.Node) -> None:
    """Rewrite the attention of one module that leads the cache, if all of it is as expected."""
    found = _attention_of(node)
    if found is None:
        return
    call, update = found
    merged, *reads = node.args
    query, mask = call.args[1], _mask_of(call)
    with graph.inserting_before(update):
        module = graph.get_attr(str(node.target))
        new = graph.call_function(update_led_, (*update.args, module, query, mask))
    new.meta.update(update.meta)
    with graph.inserting_after(new):
        led = graph.call_function(operator.getitem, (new, 3))
        longer = graph.call_function(operator.getitem, (new, 2))
    update.replace_all_uses_with(new)
    graph.erase_node(update)
    if mask is not None:
        if len(call.args) > 4:
            call.args = (*call.args[:4], longer, *call.args[5:])
        else:
            call.kwargs = {**call.kwargs, "attention_mask": longer}
    with graph.inserting_before(call):
        attend = graph.call_function(plainly_if_led(call.target), (led, *call.args), call.kwargs)
    attend.meta.update(call.meta)
    call.replace_all_uses_with(attend)
    graph.erase_node(call)
    with graph.inserting_before(node):
        made = graph.call_function(unless_led, (led, module, merged, *reads))
    made.meta.update(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _attention_of(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the attention call whose lse a module alone reads, and the update of its cache.

    The call is of a library's function around SDPA. Its keys and values are those that the cache
    returns, no other edit sees its context, and its mask comes from outside the graph.
    """
    if node.kwargs or len(node.args) < 3 or not all(isinstance(x, fx.Node) for x in node.args):
        return None
    lse: Any = node.args[2]
    if lse.target is not lse_of or set(lse.users) != {node}:
        return None
    call = lse.args[0]
    if not getattr(call.target, "calls_sdpa", False) or len(call.args) not in (4, 5):
        return None
    _, query, *pair = call.args[:4]
    if query is not node.args[1] or not _plain(call):
        return None
    update = pair[0].args[0] if pair[0].target is operator.getitem else None
    if update is None or (update.op, update.target) != ("call_method", "update"):
        return None
    wanted = [(operator.getitem, (update, i)) for i in (0, 1)]
    if [(x.target, x.args) for x in pair] != wanted or len(update.args) != 4 or update.kwargs:
        return None
    if set(update.users) != set(pair) or any(set(x.users) - {call, node} for x in pair):
        return None
    order = {each: i for i, each in enumerate(update.graph.nodes)}
    if order[query] > order[update]:
        return None
    return (call, update) if _context_reaches(call, node) else None


def _mask_of(call: fx.Node) -> Any:
    return call.args[4] if len(call.args) > 4 else call.kwargs.get("attention_mask")


def _plain(call: fx.Node) -> bool:
    """Whether nothing but the mask says which keys a query sees, and no weights are returned."""
    mask = _mask_of(call)
    if mask is not None and getattr(mask, "op", "") != "placeholder":
        return False
    for name, given in call.kwargs.items():
        found = value(given) if isinstance(given, fx.Node) else given
        if name != "attention_mask" and isinstance(found, Tensor) and found.dim() > 2:
            return False
        if name == "sliding_window" and found is not None:
            return False
    outputs = [user for user in call.users if user.target is output_of]
    return len(outputs) == 1 and _second(outputs[0]) is None


def _second(output: fx.Node) -> Any:
    """Return the example of what an attention function returns beside the context."""
    found = output.meta.get("value")
    return found[1] if isinstance(found, tuple) and len(found) == 2 else ()


def _context_reaches(call: fx.Node, node: fx.Node) -> bool:
    """Whether what follows from an attention call goes to this module alone."""
    stack, seen = list(call.users), set(call.users)
    while stack:
        current = stack.pop()
        if current is node or (current.target is put and current.args[1] is node):
            continue
        if current.op not in ("call_function", "call_method"):
            return False
        fresh = [user for user in current.users if user not in seen]
        seen.update(fresh)
        stack.extend(fresh)
    return True
