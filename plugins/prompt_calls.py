"""The modules of prompt-tuning that wrap a call of a model's module.

Alone     the trunk: the prompt runs by itself, and the tokens attend to what it leaves
InFront   the trunk: each sequence is made longer by the prompt
Cut       the stack: the prompt's places are taken out of the outputs
Memory    the trunk of a decoder: the mask of the encoder's tokens is made longer
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import surgery
from surgery_plugins.prompt_modules import Part, Run, Seen, alone


class Call(Part):
    """Wrap a trunk.

    Args:
        ids: the name of the argument that holds the token ids.
        trunk: the trunk itself.
    """

    def __init__(self, prompt: Any, ids: str, trunk: nn.Module) -> None:
        super().__init__(prompt)
        self.ids = ids
        self.trunk = surgery.Reference(trunk)

    def tokens(self, arguments: dict[str, Any]) -> Tensor:
        """Return the token ids (B, n) of a call."""
        ids = arguments.get(self.ids)
        if not isinstance(ids, Tensor):
            raise surgery.ForwardError(
                f"method 'prompt': the model was called without {self.ids!r}. The rows stand "
                "before token embeddings: pass token ids, or switch the method off with disabled()."
            )
        return ids


class Alone(Call):
    """Run the prompt by itself first; the tokens attend to its keys and values (:class:`Attend`).

    Args:
        settings: the arguments of an example call that are not tensors.
    """

    def __init__(self, prompt: Any, ids: str, trunk: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__(prompt, ids, trunk)
        self.settings = settings

    def forward(self, forward: Any, **arguments: Any) -> Any:
        if self.is_off:
            return forward(**arguments)
        ids = self.tokens(arguments)
        if not self.shared.mark.checked and not torch.is_grad_enabled():  # as a splice verifies it
            self.check(forward, ids)
        run = Run(past=so_far(arguments, None))
        run.seen = self.kept(arguments) or self.shared.seen(self, forward, ids, run)
        with self.shared.run.set(run):
            out = forward(**arguments)
        if not torch.is_grad_enabled():
            for cache in caches((arguments, out)):
                cache.surgery_prompt = self.shared.mark, run.seen
        return out

    def alone(self, forward: Any, ids: Tensor, run: Run) -> Seen:
        """Run the prompt by itself; return its keys and values."""
        parts = surgery.every_module(self.trunk.module)
        if any(hasattr(p, "full_tensor") for part in parts for p in part.parameters(recurse=False)):
            raise surgery.ForwardError(
                "method 'prompt': FSDP2 frees the weights of a layer between the prompt's own run "
                "and its backward pass, so it cannot run this model. Use method 'prefix', or DDP."
            )
        own = torch.zeros(1, self.shared.length, dtype=ids.dtype, device=ids.device)
        first = Run(alone=True)
        with surgery.without_checkpointing(self.trunk.module) as checkpointed:
            run.repeats = bool(checkpointed) and torch.is_grad_enabled()
            with alone(self.shared), self.shared.run.set(first):
                forward(**{**self.settings, self.ids: own})
        return first.seen

    def check(self, forward: Any, ids: Tensor) -> None:
        """Raise unless the tokens get from the prompt what they get if it stands before them.

        They do not where tokens mix outside attention as well, as in a state space.
        """
        self.shared.mark.checked, length, run = True, self.shared.length, Run()
        tokens = torch.zeros(1, length + ids.shape[1], dtype=ids.dtype, device=ids.device)
        run.seen = self.alone(forward, ids, run)
        outs = []
        for each, start in ((run, length), (Run(total=tokens.shape[1]), 0), (None, length)):
            on = nullcontext() if each is None else self.shared.run.set(each)
            with alone(self.shared), on:
                outs.append(_first_float(forward(**{**self.settings, self.ids: tokens[:, start:]})))
        found, expected, without = (x[:, -ids.shape[1] :].double() for x in outs)
        error, effect = (found - expected).norm(), (expected - without).norm()
        exact = outs[0].dtype in (torch.float32, torch.float64)
        if error > 0.1 * effect and error > (1e-3 if exact else 0.05) * expected.norm():
            raise surgery.SiteError(
                f"method 'prompt': in {type(self.trunk.module).__name__} tokens mix outside "
                "attention as well, as in a state space, where a prompt that runs by itself leaves "
                "nothing. Use method 'prefix' instead."
            )

    def kept(self, arguments: dict[str, Any]) -> Seen | None:
        """Return the keys and values that a KV cache has kept, if the call continues it."""
        if torch.is_grad_enabled():
            return None
        for cache in caches(arguments):
            mark, seen = getattr(cache, "surgery_prompt", (None, None))
            if mark is self.shared.mark and cache.get_seq_length() > 0:
                return seen
        return None


class InFront(Call):
    """Put P places in front of each sequence (B, n), so that it runs as (B, P + n).

    A KV cache holds the prompt's keys and values as its first P entries: the calls that continue a
    text get longer masks alone.

    Args:
        memory: the arguments that belong to another sequence, which the queries attend to.
    """

    def __init__(self, prompt: Any, ids: str, trunk: nn.Module, memory: tuple[str, ...]) -> None:
        super().__init__(prompt, ids, trunk)
        self.memory = memory

    def forward(self, forward: Any, **arguments: Any) -> Any:
        prompt, ids = self.shared, self.tokens(arguments)
        past = self.past(arguments)
        run = Run() if past else Run(total=prompt.length + ids.shape[1])
        with prompt.run.set(run):
            out = forward(**self.lengthened(arguments, ids, past))
        for cache in caches((arguments, out)):
            cache.surgery_prompt_in_front = prompt.length, int(cache.get_seq_length())
        return out

    def past(self, arguments: dict[str, Any]) -> int:
        """Return how many tokens, the prompt's P not counted, a KV cache holds."""
        for cache in caches(arguments):
            held = int(cache.get_seq_length())
            if held == 0:
                continue
            length, known = getattr(cache, "surgery_prompt_in_front", (0, 0))
            if length != self.shared.length or held != known:
                raise surgery.ForwardError(
                    f"method 'prompt': a KV cache of {held} entries does not begin with this "
                    f"prompt's {self.shared.length}, or was cropped since. Start with a new cache."
                )
            return held - length
        return 0

    def lengthened(self, arguments: dict[str, Any], ids: Tensor, past: int) -> dict[str, Any]:
        """Return the arguments with P more places in front of each sequence."""
        length, n, longer = self.shared.length, ids.shape[1], dict(arguments)
        for name, x in arguments.items():
            if not isinstance(x, Tensor) or name in (self.ids, *self.memory):
                continue
            if "position" in name and x.dim() and x.shape[-1] == n and not x.is_floating_point():
                front = torch.arange(length, dtype=x.dtype, device=x.device)
                rest = x + length
                front = front.expand(*x.shape[:-1], -1)
                longer[name] = rest if past else torch.cat([front, rest], -1)
            elif x.dim() == 2 and x.shape[1] == past + n and ("mask" in name or not past):
                if self.may_be_memory(x, arguments):
                    raise _ambiguous(name, x)
                first = _first(x)
                front = torch.ones_like(first) if "mask" in name else first
                longer[name] = torch.cat([front.expand(-1, length), x], 1)
            elif self.follows_tokens(x, n, past + n) or (name == "attention_mask" and x.dim()):
                raise surgery.ForwardError(
                    f"method 'prompt': {name!r} of shape {tuple(x.shape)} cannot be made longer. "
                    f"Pass masks of the shape {(len(ids), past + n)} of all tokens so far"
                    + ("." if x.dim() < 3 else ", and no static cache, which makes others.")
                )
        if not past:
            longer[self.ids] = torch.cat([self.real(arguments, ids).expand(-1, length), ids], 1)
        return longer

    def may_be_memory(self, x: Tensor, arguments: dict[str, Any]) -> bool:
        """Whether a mask may belong to the sequence that is attended to, for all that is known."""
        if not self.memory or _mask_names(self.memory, arguments):
            return False
        return x.shape[1] in _hidden_lengths(arguments)

    def follows_tokens(self, x: Tensor, n: int, m: int) -> bool:
        """Whether a tensor of three or more axes has one entry for each token."""
        if x.dim() < 3:
            return False
        square = x.shape[-1] == m and x.shape[-2] in (1, n)
        return square or (not x.is_floating_point() and n in x.shape[1:])

    def real(self, arguments: dict[str, Any], ids: Tensor) -> Tensor:
        """Return a token (B, 1) of each sequence that is not padding, which models hide."""
        mask = arguments.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.shape != ids.shape or not ids.shape[1]:
            return _first(ids)
        return ids.gather(1, mask.long().argmax(1, keepdim=True))


def _first(x: Tensor) -> Tensor:
    """Return the first column (B, 1) of what each token has; zeros where there is no token."""
    return x[:, :1] if x.shape[1] else x.new_zeros(len(x), 1)


class Memory(Part):
    """Make the mask (B, m) of an encoder's tokens as long as its output (B, P + m, D).

    Args:
        prompt: that of the encoder.
        memory: the arguments that belong to the encoder's sequence, as far as an example shows.
        ids: the name of the argument that holds the decoder's token ids.
    """

    def __init__(self, prompt: Any, memory: tuple[str, ...], ids: str) -> None:
        super().__init__(prompt)
        self.memory, self.ids = memory, ids

    def forward(self, forward: Any, **arguments: Any) -> Any:
        length, known = self.shared.length, _mask_names(self.memory, arguments)
        for name, x in list(arguments.items()):
            if not isinstance(x, Tensor) or x.dim() != 2 or name not in (known or arguments):
                continue
            if name == self.ids or x.shape[1] + length not in _hidden_lengths(arguments):
                continue
            if not known and x.shape[1] == so_far(arguments, arguments.get(self.ids)):
                raise _ambiguous(name, x)
            arguments[name] = torch.cat([torch.ones_like(x[:, :1]).expand(-1, length), x], 1)
        return forward(**arguments)


class Cut(Part):
    """Wrap a stack: take the prompt's places out of its outputs."""

    def forward(self, forward: Any, **arguments: Any) -> Any:
        return self.cut(forward(**arguments))

    def cut(self, x: Any) -> Any:
        run = self.shared.run.get()
        if run is None or not run.total:
            return x
        if isinstance(x, Tensor):
            whole = x.dim() == 3 and x.shape[1] == run.total
            return x[:, self.shared.length :] if whole else x
        if isinstance(x, dict):
            for name, value in x.items():
                x[name] = self.cut(value)
            return x
        return type(x)(map(self.cut, x)) if type(x) in (tuple, list) else x


def caches(values: Any) -> list[Any]:
    """Return the KV caches among values, which may be nested."""
    if hasattr(values, "get_seq_length"):
        return [values]
    if isinstance(values, dict):
        values = tuple(values.values())
    if not isinstance(values, (tuple, list)):
        return []
    return [cache for value in values for cache in caches(value)]


def so_far(arguments: dict[str, Any], ids: Tensor | None) -> int:
    """Return how many tokens a text has, those in a KV cache included and the prompt's not."""
    n = 0 if ids is None else ids.shape[1]
    for cache in caches(arguments):
        n += int(cache.get_seq_length()) - getattr(cache, "surgery_prompt_in_front", (0,))[0]
    return n


def _mask_names(memory: tuple[str, ...], arguments: dict[str, Any]) -> list[str]:
    """Return those names of a memory's arguments that are not its hidden states."""
    return [n for n in memory if getattr(arguments.get(n), "ndim", 2) == 2]


def _hidden_lengths(arguments: dict[str, Any]) -> set[int]:
    """Return the lengths m of hidden states (B, m, D) among the arguments."""
    tensors = [x for x in arguments.values() if isinstance(x, Tensor) and x.dim() == 3]
    return {x.shape[1] for x in tensors if x.is_floating_point()}


def _ambiguous(name: str, x: Tensor) -> surgery.ForwardError:
    return surgery.ForwardError(
        f"method 'prompt': {name!r} of shape {tuple(x.shape)} may be the mask of either sequence, "
        "as both are as long. Splice with example_inputs= that have a mask for the encoder."
    )


def _first_float(output: Any) -> Tensor:
    """Return the first tensor of numbers in an output: hidden states (B, n, D), or logits."""
    values = output.values() if isinstance(output, dict) else output
    found = [output] if isinstance(output, Tensor) else values
    return next(x for x in found if isinstance(x, Tensor) and x.is_floating_point())
