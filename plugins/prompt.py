"""Put trained rows in front of the input embeddings (prompt-tuning).

    prompt    E (P, D), free parameters
    mlp       tanh(E W_a + b_a) W_b + b_b           hidden width m
    ptuning   relu(relu(E W_1 + b_1) W_2 + b_2) W_3 + b_3

Lester et al. 2021, arXiv:2104.08691; P-tuning: Liu et al. 2021, arXiv:2103.10385; ``mlp``: Li and
Liang 2021, arXiv:2101.00190. A saved adapter holds the P rows alone.

In a causal model the prompt sees none of the tokens after it, so its keys and values are the same
for every sequence. It runs through the model once, by itself, and the real tokens attend to its
keys and values at each layer as to a prefix (prefix.py: no key is concatenated, no mask or cache
grows). They get the positions P, P + 1, .... In an encoder every token sees every other; there the
sequence itself is made longer at the trunk's call, and cut again after the last layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

import surgery

Encoder = Literal["none", "mlp", "ptuning"]


class Prompt(nn.Module):
    """The rows of the prompt, and whether the sequence that runs now contains them.

    Shape: () -> (P, D)
    Parameters: rows (P, D), N(0, std) or rows of the vocabulary; the encoder has torch's defaults
    """

    def __init__(self, method: PromptTuning, width: int) -> None:
        super().__init__()
        hidden = method.hidden
        self.rows = nn.Parameter(torch.randn(method.length, width) * method.std)
        self.encoder: nn.Module = nn.Identity()
        if method.encoder == "mlp":
            outer = [nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width)]
            self.encoder = nn.Sequential(*outer)
        elif method.encoder == "ptuning":
            inner = [nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
            self.encoder = nn.Sequential(*inner, nn.Linear(hidden, width))
        self.causal = self.running = self.known = False
        self.total = 0  # length of the running sequence, if the prompt is in front of others

    @property
    def length(self) -> int:
        return int(self.rows.shape[0])

    def start_from(self, vocabulary: Tensor) -> None:
        """Start from random rows of the vocabulary (V, D)."""
        with torch.no_grad():
            chosen = torch.randint(len(vocabulary), (self.length,), device=vocabulary.device)
            self.rows.copy_(vocabulary[chosen])

    @contextmanager
    def in_sequence(self, others: int) -> Iterator[None]:
        """Mark the prompt as running, by itself (0) or in front of ``others`` tokens."""
        self.running, self.total = True, self.length + others if others else 0
        try:
            yield
        finally:
            self.running, self.total = False, 0

    def forward(self) -> Tensor:
        return self.encoder(self.rows)  # type: ignore[no-any-return]


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
        self.seen: tuple[Tensor, Tensor] | None = None  # keys, values (G, P, d) of the last run

    def forward(self, merged: Tensor, query: Tensor, lse: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.shared.running:
            self.seen = k[0], v[0]
        if self.shared.running or self.seen is None:
            return merged
        if self.window is not None and k.shape[-2] + self.shared.length > self.window:
            raise surgery.ForwardError(
                f"method 'prompt': {k.shape[-2]} tokens and {self.shared.length} of the prompt are "
                f"more than the {self.window} that a token sees here. Shorten one of them."
            )
        return surgery.virtual_tokens(merged, query, lse, *self.seen, **self.scored)

    def total_lse(self, merged: Tensor, query: Tensor, lse: Tensor, *_: Tensor) -> Tensor:
        """The logsumexp of all keys, the prompt's included, for methods later in the list."""
        alone = self.shared.running or self.seen is None
        return lse if alone else surgery.virtual_lse(query, lse, *(self.seen or ()), **self.scored)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "seen": None}  # tensors with autograd history cannot be copied


class Embed(Part):
    """Replace the first P embeddings (B, n, D) by the rows while the prompt runs."""

    def forward(self, embeddings: Tensor) -> Tensor:
        prompt = self.shared
        if not prompt.running:
            return embeddings
        rows = prompt().to(embeddings.dtype).expand(len(embeddings), -1, -1)  # (B, P, D)
        return torch.cat([rows, embeddings[:, prompt.length :]], 1)


class Later(Part):
    """Return ``positions + P`` for real tokens; the running prompt keeps its positions."""

    def forward(self, positions: Tensor) -> Tensor:
        return positions if self.shared.running else positions + self.shared.length


class Call(Part):
    """Wrap the trunk: run the prompt by itself first (causal), or in front of each sequence.

    Args:
        ids: the name of the argument that holds the token ids.
        settings: the arguments of an example call that are not tensors.
        trunk: the trunk itself.
    """

    def __init__(self, prompt: Any, ids: str, settings: dict[str, Any], trunk: nn.Module) -> None:
        super().__init__(prompt)
        self.ids, self.settings = ids, settings
        self.trunk = surgery.Reference(trunk)

    def forward(self, forward: Any, **arguments: Any) -> Any:
        prompt, ids = self.shared, arguments.get(self.ids)
        if not isinstance(ids, Tensor):
            raise surgery.ForwardError(
                f"method 'prompt': the model was called without {self.ids!r}. The rows stand "
                "before token embeddings: pass token ids, or switch the method off with disabled()."
            )
        if not prompt.causal:
            with prompt.in_sequence(ids.shape[1]):
                return forward(**self.lengthened(arguments, ids))
        if torch.is_grad_enabled() or not (prompt.known and continued(arguments)):
            own = torch.zeros(1, prompt.length, dtype=ids.dtype, device=ids.device)
            with prompt.in_sequence(0), surgery.without_checkpointing(self.trunk.module):
                forward(**{**self.settings, self.ids: own})
            prompt.known = not torch.is_grad_enabled()
        return forward(**arguments)

    def lengthened(self, arguments: dict[str, Any], ids: Tensor) -> dict[str, Any]:
        """Return the arguments with P more places in front of each sequence."""
        length, longer = self.shared.length, dict(arguments)
        for name, x in arguments.items():
            if not isinstance(x, Tensor) or x.dim() < 2 or ids.shape[1] not in x.shape[1:]:
                continue
            if x.shape != ids.shape:
                raise surgery.ForwardError(
                    f"method 'prompt': {name!r} of shape {tuple(x.shape)} cannot be made longer. "
                    f"Pass masks of the shape {tuple(ids.shape)} of {self.ids!r}."
                )
            front = torch.ones_like(x[:, :1]) if "mask" in name else x[:, :1]
            longer[name] = torch.cat([front.expand(-1, length), x], 1)
        mask = arguments.get("attention_mask")
        if isinstance(mask, Tensor):  # the prompt's ids must not be padding, which models hide
            real = ids.gather(1, mask.long().argmax(1, keepdim=True))
            longer[self.ids] = torch.cat([real.expand(-1, length), ids], 1)
        return longer


def continued(arguments: dict[str, Any]) -> bool:
    """Whether a call continues a sequence whose beginning is in a KV cache."""
    return any(x.get_seq_length() > 0 for x in arguments.values() if hasattr(x, "get_seq_length"))


class Cut(Part):
    """Wrap the stack of an encoder: take the prompt's places out of its outputs."""

    def forward(self, forward: Any, **arguments: Any) -> Any:
        return self.cut(forward(**arguments))

    def cut(self, x: Any) -> Any:
        prompt = self.shared
        if not prompt.total:
            return x
        if isinstance(x, Tensor):
            whole = x.dim() == 3 and x.shape[1] == prompt.total
            return x[:, prompt.length :] if whole else x
        if isinstance(x, dict):
            for name, value in x.items():
                x[name] = self.cut(value)
            return x
        return type(x)(map(self.cut, x)) if type(x) in (tuple, list) else x


@dataclass(frozen=True)
class PromptTuning(surgery.Method):
    """Put trained rows in front of the input embeddings of a causal model or an encoder.

    Args:
        length: number P of rows.
        encoder: the map from parameters to rows: ``none``, ``mlp`` or ``ptuning``, see above.
        hidden: inner width m of the encoder.
        init: ``vocabulary``, random rows of the embedding, or ``normal``, N(0, std).
        std: standard deviation of ``normal``.

    Start: none. Not mergeable. Stored: P D. Trained in addition: mlp 2 D m + m + D; ptuning
    2 D m + m^2 + 2 m + D. A causal model must encode positions by number.
    """

    name = "prompt"
    kinds = ("attention", "position", "embedding", "trunk", "stack")
    needs = "token ids that are embedded at one place"
    together = True

    length: int = 20
    encoder: Encoder = "none"
    hidden: int = 512
    init: Literal["vocabulary", "normal"] = "vocabulary"
    std: float = 0.02

    def __post_init__(self) -> None:
        self.require(isinstance(self.length, int) and self.length >= 1, "length", "an integer >= 1")
        self.require(self.encoder in get_args(Encoder), "encoder", "one of none, mlp, ptuning")
        self.require(isinstance(self.hidden, int) and self.hidden >= 1, "hidden", "an integer >= 1")
        self.require(self.init in ("vocabulary", "normal"), "init", "'vocabulary' or 'normal'")
        self.require(self.std > 0, "std", "a number > 0")

    @property
    def start(self) -> surgery.Start:
        return "none"

    def plain(self) -> PromptTuning:
        return dataclasses.replace(self, encoder="none")

    def suits(self, site: surgery.Site) -> bool:
        if site.kind == "attention":
            return site.causal and not site.cross and "lse" in site.ports
        return site.kind in self.kinds

    def check(self, sites: list[surgery.Site]) -> None:
        kinds = {site.kind for site in sites}
        if "trunk" not in kinds:
            raise surgery.SiteError(
                "method 'prompt': not exactly one module of this model embeds token ids, or the "
                "selection leaves it out. Splice without at=, or select with Sites.where."
            )
        if "attention" in kinds and "position" not in kinds:
            raise surgery.SiteError(
                "method 'prompt': no module of this causal model encodes positions by number, so "
                "no token can be placed after the prompt. Use method 'prefix' instead."
            )

    def splice(self, site: surgery.OpenSite) -> None:
        prompt: Any = site.share("prompt", lambda: Prompt(self, site.width))
        own: Prompt = prompt if isinstance(prompt, Prompt) else prompt.module
        if site.kind == "attention":
            own.causal = True
            reads = ("merged", "query_heads", "lse", "key_heads", "value_heads")
            site.port("merged").replace(Attend(prompt, site), name=self.name, reads=reads)
        elif site.kind == "position":
            site.port("positions").insert(Later(prompt), name=self.name)
        elif site.kind == "embedding":
            if self.init == "vocabulary":
                own.start_from(site.base().weight)
            site.port("output").insert(Embed(prompt), name=self.name)
        elif site.kind == "trunk":
            settings = {n: x for n, x in site.call.items() if not isinstance(x, Tensor)}
            site.port("call").wrap(Call(prompt, site.ids, settings, site.base()), name=self.name)
        else:
            site.port("call").wrap(Cut(prompt), name=f"{self.name}_cut")


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    register(PromptTuning)
