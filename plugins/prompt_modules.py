"""The modules of prompt-tuning that run inside a model, and what they tell each other.

A wrap of the trunk (prompt_calls.py) sets a Run for one call of the model, and then runs
  Embed      puts the rows in the place of embeddings
  Later      moves the positions of the tokens behind the prompt
  Attend     keeps the prompt's keys and values in the Run, or lets tokens attend to them
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import surgery

Seen = dict[str, tuple[Tensor, Tensor]]  # keys and values (G, P, d) of the prompt, by attention


class Run:
    """One call of a model, as the parts of its prompt share it.

    Args:
        alone: whether the prompt runs by itself now.
        total: length of the running sequence if the prompt stands in front of others, else 0.
        past: how many tokens before those of this call a KV cache holds, the prompt not counted.

    Attributes:
        repeats: whether gradient checkpointing is on.
        seen: the keys and values of the prompt.
        copies: leaves in their place, which collect the gradients of repeated layers.
    """

    def __init__(self, alone: bool = False, total: int = 0, past: int = 0) -> None:
        self.alone, self.total, self.past, self.repeats = alone, total, past, False
        self.seen: Seen = {}
        self.copies: Seen = {}

    @property
    def contains_prompt(self) -> bool:
        """Whether the sequence that runs now contains the prompt."""
        return self.alone or self.total > 0

    def keys_and_values(self, attention: str) -> tuple[Tensor, Tensor]:
        """Return what the tokens attend to; in a layer that is repeated, copies of it."""
        keys, values = self.seen[attention]
        if not (self.repeats and surgery.in_backward()):
            return keys, values
        if attention not in self.copies:
            k, v = keys.detach(), values.detach()
            self.copies[attention] = k.requires_grad_(), v.requires_grad_()
        return self.copies[attention]


class Collect(torch.autograd.Function):
    """Pass the embeddings on; backwards, give the prompt the gradients of repeated layers.

    Reentrant checkpointing runs a backward pass of its own for each layer. Were the prompt's run a
    part of each, autograd would go through it once for each layer. The embeddings come before all
    layers, so their backward comes when the last of these passes is over.
    """

    @staticmethod
    def forward(ctx: Any, run: Run, embeddings: Tensor, *seen: Tensor) -> Tensor:
        ctx.run = run
        return embeddings.view_as(embeddings)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        pairs = [ctx.run.copies.get(name, (None, None)) for name in ctx.run.seen]
        ctx.run.copies = {}
        return None, grad, *(None if x is None else x.grad for pair in pairs for x in pair)


class Mark:
    """Tells what a KV cache has kept of a prompt, and whether the prompt was checked."""

    checked = False


class Prompt(nn.Module):
    """The rows of the prompt, and the call that runs now.

    Args:
        rows: what the rows (P, D) start from.
        encoder: the map from parameters to rows.

    Shape: () -> (P, D)
    """

    def __init__(self, rows: Tensor, encoder: nn.Module) -> None:
        super().__init__()
        self.rows, self.encoder = nn.Parameter(rows), encoder
        self.run = surgery.CallValue[Run]()
        self.mark = Mark()
        self.remembered = surgery.Remembered[tuple[dict[str, Tensor], Seen]]()

    @property
    def length(self) -> int:
        return int(self.rows.shape[0])

    def train(self, mode: bool = True) -> Prompt:
        if mode or self.training:  # eval() of a model that is in eval mode changes nothing
            self.remembered.forget()
        return super().train(mode)

    def seen(self, call: Any, *given: Any) -> Seen:
        """Return the keys and values of a run by itself, ``call.alone(*given)``.

        Without gradients those of an earlier run serve while nothing has changed in ``call.trunk``.
        The prompt's own parameters are compared by value, as a write to their ``data`` leaves no
        other trace.
        """
        if torch.is_grad_enabled():
            self.remembered.forget()
            made: Seen = call.alone(*given)
            return made
        trunk = call.trunk.module
        own, seen = self.remembered.get(trunk) or ({}, {})
        if not seen or not all(torch.equal(x, own[n]) for n, x in self.named_parameters()):
            own = {n: x.detach().clone() for n, x in self.named_parameters()}
            seen = call.alone(*given)
            self.remembered.set(trunk, (own, seen))
        return seen

    def start_from(self, vocabulary: Tensor) -> None:
        """Start from random rows of the vocabulary (V, D); rows without values stay so."""
        if self.rows.is_meta:
            return
        with torch.no_grad():
            chosen = torch.randint(len(vocabulary), (self.length,), device=vocabulary.device)
            self.rows.copy_(vocabulary[chosen])

    def forward(self) -> Tensor:
        rows: Tensor = self.encoder(self.rows)
        return rows.clone() if rows is self.rows else rows  # FSDP2 frees a parameter after forward


class _Thread(threading.local):
    alone: Prompt | None = None


_thread = _Thread()


@contextmanager
def alone(prompt: Prompt) -> Iterator[None]:
    """Let a prompt run by itself inside the ``with`` block; others are off meanwhile."""
    outer, _thread.alone = _thread.alone, prompt
    try:
        yield
    finally:
        _thread.alone = outer


class Part(nn.Module):
    """A module at one site; the first of a splice owns the prompt, the others refer to it."""

    def __init__(self, prompt: Any) -> None:
        super().__init__()
        self.prompt = prompt

    @property
    def shared(self) -> Prompt:
        return self.prompt if isinstance(self.prompt, Prompt) else self.prompt.module  # type: ignore[no-any-return]

    @property
    def run(self) -> Run | None:
        """The run of the model that this prompt takes part in now."""
        return None if self.is_off else self.shared.run.get()

    @property
    def is_off(self) -> bool:
        """Whether another prompt runs by itself."""
        return _thread.alone not in (None, self.shared)

    def plain_state(self) -> dict[str, Tensor]:
        """The tensors to store after training: the rows."""
        with torch.no_grad():
            return {"prompt.rows": self.prompt()} if isinstance(self.prompt, Prompt) else {}


class Attend(Part):
    """Let the tokens of one causal attention attend to the keys and values of the prompt.

    Shape: merged (B, n, H d), query (B, H, n, d), lse (B, H, n), k, v (B, G, m, d) -> (B, n, H d)
    """

    def __init__(self, prompt: Any, site: surgery.Site) -> None:
        super().__init__(prompt)
        self.window, self.scale, self.softcap = site.window, site.scale, site.softcap
        self.path = f"{site.path} {site.key}".strip()  # heads may be sites of one module

    def forward(self, merged: Tensor, query: Tensor, lse: Tensor, k: Tensor, v: Tensor) -> Tensor:
        run = self.call()
        if run is None or run.total:
            return merged
        if run.alone:
            if self.path in run.seen:
                raise surgery.ForwardError(
                    f"method 'prompt': {self.path} runs twice in one forward, so the prompt has "
                    "more than one set of keys and values there. Use method 'prefix' instead."
                )
            run.seen[self.path] = k[0], v[0]
            return merged
        return surgery.virtual_tokens(merged, query, lse, **self.tokens(run, query))

    def total_lse(self, merged: Tensor, query: Tensor, lse: Tensor, *_: Tensor) -> Tensor:
        """The logsumexp of all keys, the prompt's included, for methods later in the list."""
        run = self.call()
        if run is None or run.contains_prompt:
            return lse
        return surgery.virtual_lse(query, lse, **self.tokens(run, query))

    def leading_keys(self) -> tuple[Tensor, Tensor] | None:
        """The keys and values of the prompt, where every token sees all of them."""
        run = self.call()
        if run is None or run.contains_prompt or self.window is not None:
            return None
        return run.seen[self.path]

    def tokens(self, run: Run, query: Tensor) -> dict[str, Any]:
        """The arguments of ``surgery.virtual_tokens`` that describe the prompt here."""
        keys, values = run.keys_and_values(self.path)
        found = {"keys": keys, "values": values, "scale": self.scale, "softcap": self.softcap}
        if self.window is None or run.past + query.shape[2] + len(keys[0]) <= self.window:
            return found
        return {**found, "scores": self.windowed(run.past, len(keys[0])), "softcap": None}

    def windowed(self, past: int, length: int) -> Any:
        """Return a function of the scores (B, H, n, P) that hides what is out of the window.

        Query i is token P + past + i of the whole sequence, and sees the last ``window`` tokens.
        """
        window, softcap = self.window, self.softcap
        assert window is not None

        def hide(scores: Tensor) -> Tensor:
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            last = torch.arange(scores.shape[-2], device=scores.device)[:, None] + length + past
            hidden = torch.arange(length, device=scores.device) <= last - window  # (n, P)
            return scores.masked_fill(hidden, torch.finfo(scores.dtype).min / 2)

        return hide

    def call(self) -> Run | None:
        """Return the call of the model that runs now; None if this attention runs by itself."""
        run = self.run
        if run is None and not self.is_off and surgery.in_backward():
            raise surgery.ForwardError(
                f"method 'prompt': {self.path} runs again in a backward pass, and its first run "
                "cannot be told. Checkpoint with torch.utils.checkpoint, or not at all."
            )
        return run


class Embed(Part):
    """Replace the first P embeddings (B, n, D) by the rows while the prompt runs."""

    def forward(self, embeddings: Tensor) -> Tensor:
        prompt, run = self.shared, self.run
        if run is None or not run.contains_prompt:
            if run is None or not run.repeats:
                return embeddings
            seen = [x for pair in run.seen.values() for x in pair]
            return Collect.apply(run, embeddings, *seen)  # type: ignore[no-any-return, no-untyped-call]
        if embeddings.shape[1] < max(prompt.length, run.total):  # other tokens, as padding is
            return embeddings
        rows = prompt().to(embeddings.dtype).expand(len(embeddings), -1, -1)  # (B, P, D)
        return torch.cat([rows, embeddings[:, prompt.length :]], 1)


class Later(Part):
    """Return ``positions + P`` for real tokens; the running prompt keeps its positions."""

    def forward(self, positions: Tensor) -> Tensor:
        run = self.run
        inside = run is not None and run.contains_prompt
        return positions if inside or self.is_off else positions + self.shared.length
