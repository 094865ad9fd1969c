"""Put trained rows in front of the input embeddings (prompt-tuning).

    prompt    E (P, D), free parameters
    mlp       tanh(E W_a + b_a) W_b + b_b           hidden width m
    ptuning   relu(relu(E W_1 + b_1) W_2 + b_2) W_3 + b_3

Lester et al. 2021, arXiv:2104.08691; P-tuning: Liu et al. 2021, arXiv:2103.10385; ``mlp``: Li and
Liang 2021, arXiv:2101.00190. A saved adapter holds the P rows alone.

In a causal model the prompt sees none of the tokens after it, so its keys and values are the same
for every sequence. It runs through the model once, by itself, and the real tokens attend to its
keys and values at each layer as to a prefix (prefix.py: no key is concatenated, no mask or cache
grows). They get the positions P, P + 1, .... A KV cache keeps the prompt's keys and values, too. In
an encoder every token sees every other; there the sequence itself is made longer at the trunk's
call, and cut again after the last layer. A layer that is called by itself runs without the prompt.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

import surgery
from surgery_plugins.prompt_modules import Attend, Embed, Later, Part, Prompt, Run, Seen

Encoder = Literal["none", "mlp", "ptuning"]


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
            with prompt.run.set(Run(total=prompt.length + ids.shape[1])):
                return forward(**self.lengthened(arguments, ids))
        run = Run()
        run.seen = self.kept(arguments) or self.alone(forward, ids, run)
        with prompt.run.set(run):
            out = forward(**arguments)
        if not torch.is_grad_enabled():
            for cache in caches((arguments, out)):
                cache.surgery_prompt = self.shared.mark, run.seen
        return out

    def alone(self, forward: Any, ids: Tensor, run: Run) -> Seen:
        """Run the prompt by itself; return its keys and values."""
        if any(hasattr(p, "full_tensor") for p in self.trunk.module.parameters()):
            raise surgery.ForwardError(
                "method 'prompt': FSDP2 frees the weights of a layer between the prompt's own run "
                "and its backward pass, so it cannot run this model. Use method 'prefix', or DDP."
            )
        own = torch.zeros(1, self.shared.length, dtype=ids.dtype, device=ids.device)
        first = Run(alone=True)
        with surgery.without_checkpointing(self.trunk.module) as checkpointed:
            run.repeats = bool(checkpointed) and torch.is_grad_enabled()
            with self.shared.run.set(first):
                forward(**{**self.settings, self.ids: own})
        return first.seen

    def kept(self, arguments: dict[str, Any]) -> Seen | None:
        """Return the keys and values that a KV cache has kept, if the call continues it."""
        if torch.is_grad_enabled():
            return None
        for cache in caches(arguments):
            mark, seen = getattr(cache, "surgery_prompt", (None, None))
            if mark is self.shared.mark and cache.get_seq_length() > 0:
                return seen
        return None

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


def caches(values: Any) -> list[Any]:
    """Return the KV caches among values, which may be nested."""
    if hasattr(values, "get_seq_length"):
        return [values]
    if isinstance(values, dict):
        values = tuple(values.values())
    if not isinstance(values, (tuple, list)):
        return []
    return [cache for value in values for cache in caches(value)]


class Cut(Part):
    """Wrap the stack of an encoder: take the prompt's places out of its outputs."""

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

    def rows(self, width: int) -> Prompt:
        """Return new rows of N(0, std); an encoder starts from torch's defaults."""
        rows, m = torch.randn(self.length, width) * self.std, self.hidden
        layers: list[nn.Module] = []
        if self.encoder == "mlp":
            layers = [nn.Linear(width, m), nn.Tanh(), nn.Linear(m, width)]
        elif self.encoder == "ptuning":
            layers = [nn.Linear(width, m), nn.ReLU(), nn.Linear(m, m), nn.ReLU()]
            layers.append(nn.Linear(m, width))
        return Prompt(rows, nn.Sequential(*layers) if layers else nn.Identity())

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
        prompt: Any = site.share("prompt", lambda: self.rows(site.width))
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
