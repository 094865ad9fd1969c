"""Say what one call of a model is about: the positions of its tokens, its padding, its cache.

    positions  (B, n)  the position ids that the call is given; else each token's number in its row:
                       how many real tokens stand before it, those in the cache included
    padding    (B, n)  True for real tokens, False for padding
    cached     ()      how many places the KV cache holds before the call: 0 in a prefill

They are read from the arguments of the module that embeds the tokens, by the names that the field
gives them: a ``position_ids``, a mask (``attention_mask``; True is padding in a
``..._padding_mask``), and a cache, which has ``get_seq_length``. All three are tensors, so that a
module can compute with them in a compiled graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from surgery.interop.arguments import arguments_with_names
from surgery.interop.call_value import CallValue

_OTHERS = ("encoder_", "memory_", "cross_")  # arguments about the tokens that a decoder reads
HIDDEN = -1e4  # an additive mask hides a key with less


class CallFacts(NamedTuple):
    """What is known of a call; None where its mask is of a kind that is not known.

    ``sure`` says whether the tokens are known by their ids; else embeddings were taken for them.
    """

    positions: Tensor | None
    padding: Tensor | None
    cached: Tensor
    sure: bool


class _Running(CallValue[CallFacts]):
    """The facts of the call that runs; calls may lie inside each other."""

    def __init__(self) -> None:
        super().__init__()
        self._outer: tuple[Any, ...] = ()

    def begin(self, facts: CallFacts | None) -> None:
        """A call begins."""
        self._outer = self._outer, self._value, self._repeats
        self._value, self._repeats = facts, torch.is_grad_enabled()

    def end(self) -> None:
        """The call that began last ends."""
        if self._outer:
            self._outer, self._value, self._repeats = self._outer


CALL_FACTS = _Running()


class Telling:
    """A hook in front of a module: it notes what the call is about.

    Args:
        ids: the name of the argument that holds the token ids.
    """

    def __init__(self, ids: str) -> None:
        self.ids = ids

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = arguments_with_names(type(module).forward, args, kwargs)
        CALL_FACTS.begin(call_facts(given, self.ids))


def call_ends(*_: Any) -> None:
    """Forget what a call was about: a hook behind it."""
    CALL_FACTS.end()


@contextmanager
def told_again(module: nn.Module, args: Any, kwargs: Any) -> Iterator[None]:
    """Note what a call is about anew: what wraps it may have put other tokens into it."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, Telling)]
    for hook in hooks:
        hook(module, args, kwargs)
    try:
        yield
    finally:
        for _ in hooks:
            CALL_FACTS.end()


def tell_calls(model: nn.Module, tellers: Mapping[str, str]) -> None:
    """Let these modules, and no others, note what their calls are about.

    Args:
        trunks: the name of the argument with the token ids, by the path of the module.
    """
    for path, module in model.named_modules():
        before, behind = module._forward_pre_hooks, module._forward_hooks
        mine = [key for key, hook in before.items() if isinstance(hook, Telling)]
        theirs = [key for key, hook in behind.items() if hook is call_ends]
        if path in tellers and not mine:
            module.register_forward_pre_hook(Telling(tellers[path]), with_kwargs=True)
            module.register_forward_hook(call_ends, always_call=True)
        for key in mine if path not in tellers else ():
            del before[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
        for key in theirs if path not in tellers else ():
            del behind[key]
            module._forward_hooks_always_called.pop(key, None)


def call_facts(arguments: Mapping[str, Any], ids: str) -> CallFacts | None:
    """Return the facts of a call; None if it is given neither ids nor embeddings.

    Args:
        arguments: the arguments of the call, by name.
        ids: the name of the argument that holds the token ids.
    """
    tokens = arguments.get(ids)
    sure = isinstance(tokens, Tensor)
    if not isinstance(tokens, Tensor):
        own = (x for name, x in arguments.items() if not name.startswith(_OTHERS))
        tokens = next((x for x in own if _is_embedded(x)), None)
    if tokens is None:
        return None
    batch, n = tokens.shape[:2]
    places = torch.arange(n, device=tokens.device)
    known, mask = _mask(arguments)
    past = _past(arguments)
    if past is None:  # a cache of another kind: its mask tells its length
        past = mask.shape[1] - n if mask is not None and mask.shape[1] > n else 0
    cached = torch.zeros((), dtype=torch.long, device=tokens.device) + past
    given = arguments.get("position_ids")
    while isinstance(given, Tensor) and given.dim() > 2:  # several axes of an image: the first
        given = given[0]
    if mask is None and known:
        padding: Tensor | None = torch.ones(batch, n, dtype=torch.bool, device=tokens.device)
        positions: Tensor | None = (places + cached).expand(batch, n)
    elif mask is None:
        padding = positions = None
    else:
        at = _places(mask, places, past)
        counted = (mask.long().cumsum(-1) - 1).clamp(min=0)
        padding = mask.index_select(1, at).expand(batch, n)
        positions = counted.index_select(1, at).expand(batch, n)
        if mask.shape[1] == n:  # the mask is of the new tokens alone
            positions = positions + cached
    if isinstance(given, Tensor) and given.shape[-1] == n:
        positions = given.expand(batch, n)
    return CallFacts(positions, padding, cached, sure or bool(ids))


def _is_embedded(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 3


def _past(arguments: Mapping[str, Any]) -> Any:
    """Return how many places the cache holds, a number or a tensor; None without a cache."""
    for each in arguments.values():
        if hasattr(each, "get_seq_length"):
            return each.get_seq_length()
    return None


def _places(mask: Tensor, places: Tensor, past: Any) -> Tensor:
    """Return the columns of a mask (B, m) that belong to the tokens of the call.

    A cache of fixed size has places behind the tokens, so they follow those that are filled; else
    they are the last.
    """
    m, n = mask.shape[1], places.shape[0]
    if m == n:  # of the new tokens alone
        return places
    if isinstance(past, Tensor):
        return (places + past).clamp(max=m - 1)
    return places + (past if m > past + n else m - n)


def _mask(arguments: Mapping[str, Any]) -> tuple[bool, Tensor | None]:
    """Return whether the padding is known, and which keys are real, (B, m); None if all are."""
    masks = {n: x for n, x in arguments.items() if n == "attention_mask" or "padding_mask" in n}
    masks = {n: x for n, x in masks.items() if not n.startswith(_OTHERS)}
    name, given = next(((n, x) for n, x in masks.items() if x is not None), ("", None))
    if given is None:
        return True, None
    if isinstance(given, Mapping):  # one for each kind of layer
        if given and "full_attention" not in given:  # a window does not show all tokens
            return all(x is None for x in given.values()), None
        given = given.get("full_attention")
        if given is None:
            return True, None
    if not isinstance(given, Tensor) or given.dim() not in (2, 4):
        return False, None
    if given.dim() == 2:
        if given.is_floating_point():  # of ones, or additive: 0 and the lowest number
            return True, torch.where((given < 0).any(), given > HIDDEN, given != 0)
        hides = name.endswith("padding_mask") and given.dtype == torch.bool
        return True, ~given if hides else given != 0
    seen = given if given.dtype == torch.bool else given > HIDDEN
    return True, seen.any(-2).any(1)
