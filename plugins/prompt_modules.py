"""The modules of prompt-tuning that run inside a model, and what they tell each other.

Call (prompt.py) sets a Run for one call of the model, and runs
  Embed      puts the rows in the place of embeddings
  Later      moves the positions of the tokens behind the prompt
  Attend     keeps the prompt's keys and values in the Run, or lets tokens attend to them
"""

from __future__ import annotations

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
        repeats: whether gradient checkpointing is on.

    Attributes:
        seen: the keys and values of the prompt.
        copies: leaves in their place, which collect the gradients of repeated layers.
    """

    def __init__(self, alone: bool = False, total: int = 0, repeats: bool = False) -> None:
        self.alone, self.total, self.repeats = alone, total, repeats
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
        self.causal = False
        self.run = surgery.CallValue[Run]()
        self.mark = object()  # tells what a KV cache has kept of this prompt

    @property
    def length(self) -> int:
        return int(self.rows.shape[0])

    def start_from(self, vocabulary: Tensor) -> None:
        """Start from random rows of the vocabulary (V, D)."""
        with torch.no_grad():
            chosen = torch.randint(len(vocabulary), (self.length,), device=vocabulary.device)
            self.rows.copy_(vocabulary[chosen])

    def forward(self) -> Tensor:
        rows: Tensor = self.encoder(self.rows)
        return rows.clone() if rows is self.rows else rows  # FSDP2 frees a parameter after forward


class Part(nn.Module):
    """A module at one site; the first of a splice owns the prompt, the others refer to it."""

    def __init__(self, prompt: Any) -> None:
        super().__init__()
        self.prompt = prompt

    @property
    def shared(self) -> Prompt:
        return self.prompt if isinstance(self.prompt, Prompt) else self.prompt.module  # type: ignore[no-any-return]

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
        self.window, self.scored = site.window, {"scale": site.scale, "softcap": site.softcap}
        self.path = site.path

    def forward(self, merged: Tensor, query: Tensor, lse: Tensor, k: Tensor, v: Tensor) -> Tensor:
        run = self.call()
        if run is None:
            return merged
        if run.alone:
            if self.path in run.seen:
                raise surgery.ForwardError(
                    f"method 'prompt': {self.path} runs twice in one forward, so the prompt has "
                    "more than one set of keys and values there. Use method 'prefix' instead."
                )
            run.seen[self.path] = k[0], v[0]
            return merged
        if self.window is not None and k.shape[-2] + self.shared.length > self.window:
            raise surgery.ForwardError(
                f"method 'prompt': {k.shape[-2]} tokens and {self.shared.length} of the prompt are "
                f"more than the {self.window} that a token sees here. Shorten one of them."
            )
        seen = run.keys_and_values(self.path)
        return surgery.virtual_tokens(merged, query, lse, *seen, **self.scored)

    def total_lse(self, merged: Tensor, query: Tensor, lse: Tensor, *_: Tensor) -> Tensor:
        """The logsumexp of all keys, the prompt's included, for methods later in the list."""
        run = self.call()
        if run is None or run.alone:
            return lse
        return surgery.virtual_lse(query, lse, *run.keys_and_values(self.path), **self.scored)

    def call(self) -> Run | None:
        """Return the call of the model that runs now; None if this attention runs by itself."""
        run = self.shared.run.get()
        if run is None and surgery.in_backward():
            raise surgery.ForwardError(
                f"method 'prompt': {self.path} runs again in a backward pass, and its first run "
                "cannot be told. Checkpoint with torch.utils.checkpoint, or not at all."
            )
        return run


class Embed(Part):
    """Replace the first P embeddings (B, n, D) by the rows while the prompt runs."""

    def forward(self, embeddings: Tensor) -> Tensor:
        prompt, run = self.shared, self.shared.run.get()
        if run is None or not run.contains_prompt:
            if run is None or not run.repeats:
                return embeddings
            seen = [x for pair in run.seen.values() for x in pair]
            return Collect.apply(run, embeddings, *seen)  # type: ignore[no-any-return, no-untyped-call]
        rows = prompt().to(embeddings.dtype).expand(len(embeddings), -1, -1)  # (B, P, D)
        return torch.cat([rows, embeddings[:, prompt.length :]], 1)


class Later(Part):
    """Return ``positions + P`` for real tokens; the running prompt keeps its positions."""

    def forward(self, positions: Tensor) -> Tensor:
        run = self.shared.run.get()
        inside = run is not None and run.contains_prompt
        return positions if inside else positions + self.shared.length
