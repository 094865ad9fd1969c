"""Put trained rows in front of the input embeddings (prompt-tuning).

    prompt    E (P, D), free parameters
    mlp       tanh(E W_a + b_a) W_b + b_b           hidden width m
    ptuning   relu(relu(E W_1 + b_1) W_2 + b_2) W_3 + b_3

    h = model([prompt ; embedded tokens])[P:]       the outputs at the tokens' places

Lester et al. 2021, arXiv:2104.08691; P-tuning: Liu et al. 2021, arXiv:2103.10385; ``mlp``: Li and
Liang 2021, arXiv:2101.00190. A saved adapter holds the P rows alone.

In a causal model the prompt sees none of the tokens after it, so its keys and values are the same
for every sequence. If positions are numbers it runs through the model once, by itself, and the
real tokens attend to its keys and values at each layer as to a prefix (prefix.py: no key is
concatenated, no mask or cache grows). They get the positions P, P + 1, .... A KV cache keeps the
prompt's keys and values, too, and they serve the next generation if nothing has changed by then
(``surgery.Remembered``).

In every other model the sequence itself is made longer at the trunk's call, and cut again after
the last layer: in an encoder, where every token sees every other; in a decoder that attends to an
encoder's output, as the prompt does that too; and where positions are distances, or none. There a
KV cache grows by P. In front of an encoder that a decoder reads, nothing is cut: the decoder sees
the prompt's places, as in Lester et al., and the mask of the encoder's tokens gets P ones.

A layer that is called by itself runs without the prompt.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

import surgery
from surgery_plugins.prompt_calls import Alone, Cut, InFront, Memory
from surgery_plugins.prompt_modules import Attend, Embed, Later, Prompt

Encoder = Literal["none", "mlp", "ptuning"]
Sequence = Literal["encoder", "decoder", "both"]


@dataclass(frozen=True)
class Tower:
    """The sites of one sequence of tokens: those in its trunk, and not in a trunk inside it."""

    trunk: surgery.Site
    sites: list[surgery.Site]

    @property
    def alone(self) -> list[surgery.Site]:
        """The attention and positions that serve a prompt which runs by itself, if it can."""
        positions = [site for site in self.sites if site.kind == "position"]
        attention = [s for s in self.sites if s.kind == "attention" and s.causal and not s.cross]
        can = attention and positions and self.trunk.role != "decoder"
        can = can and all("lse" in site.ports for site in attention)
        return [*attention, *positions] if can else []

    def chosen(self, cut: bool) -> list[surgery.Site]:
        """The sites that the method edits; a stack is where the prompt's places are cut."""
        cut = cut and self.trunk.role != "encoder"  # which a decoder reads
        kinds = ("embedding", "stack", "trunk") if cut else ("embedding", "trunk")
        return [*self.alone, *(site for site in self.sites if site.kind in kinds)]


def towers(sites: list[surgery.Site]) -> list[Tower]:
    """Return the towers that sites belong to, in the order of their trunks."""
    trunks = [site for site in sites if site.kind == "trunk"]
    found = {trunk.path: Tower(trunk, []) for trunk in trunks}
    for site in sites:
        above = [path for path in found if not path or f"{site.path}.".startswith(f"{path}.")]
        if above:
            found[max(above, key=len)].sites.append(site)
    return list(found.values())


@dataclass(frozen=True)
class PromptTuning(surgery.Method):
    """Put trained rows in front of the input embeddings of a model that is given token ids.

    Args:
        length: number P of rows.
        encoder: the map from parameters to rows: ``none``, ``mlp`` or ``ptuning``, see above.
        hidden: inner width m of the encoder.
        init: ``vocabulary``, random rows of the embedding, or ``normal``, N(0, std).
        std: standard deviation of ``normal``.
        sequence: in front of which tokens of an encoder-decoder the rows stand: ``encoder``,
            ``decoder``, or ``both``, each with rows of its own.
        cut: whether a prompt that runs with its tokens is cut from the outputs. If not, a head that
            reads the first place reads a row's, and outputs are longer by P.

    Start: none. Not mergeable. Stored: P D. Trained in addition: mlp 2 D m + m + D; ptuning
    2 D m + m^2 + 2 m + D. Twice that for ``both``.
    """

    name = "prompt"
    kinds = ("attention", "position", "embedding", "trunk", "stack")
    needs = "token ids that are embedded at one place"
    size = ("length",)
    together = True

    length: int = 20
    encoder: Encoder = "none"
    hidden: int = 512
    init: Literal["vocabulary", "normal"] = "vocabulary"
    std: float = 0.02
    sequence: Sequence = "encoder"
    cut: bool = True

    def __post_init__(self) -> None:
        self.require(isinstance(self.length, int) and self.length >= 1, "length", "an integer >= 1")
        self.require(self.encoder in get_args(Encoder), "encoder", "one of none, mlp, ptuning")
        self.require(isinstance(self.hidden, int) and self.hidden >= 1, "hidden", "an integer >= 1")
        self.require(self.init in ("vocabulary", "normal"), "init", "'vocabulary' or 'normal'")
        self.require(self.std > 0, "std", "a number > 0")
        which = "one of encoder, decoder, both"
        self.require(self.sequence in get_args(Sequence), "sequence", which)

    @property
    def start(self) -> surgery.Start:
        return "none"

    @property
    def lengthens(self) -> bool:
        return not self.cut

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

    def choose(self, sites: list[surgery.Site]) -> list[surgery.Site]:
        found = towers(sites)
        if not found:
            raise surgery.SiteError(
                "method 'prompt': not exactly one module of this model embeds token ids, or the "
                "selection leaves it out. Splice without at=, or select with Sites.where."
            )
        own = self.own(found)
        read = [t.trunk for t in found if t.trunk.role == "decoder" and t not in own]
        read = read if any(t.trunk.role == "encoder" for t in own) else []
        chosen = {id(site) for site in [*(s for t in own for s in t.chosen(self.cut)), *read]}
        return [site for site in sites if id(site) in chosen]

    def own(self, found: list[Tower]) -> list[Tower]:
        """Return the towers whose tokens get a prompt."""
        roles = {tower.trunk.role: tower for tower in found}
        if len(found) == 2 and set(roles) == {"encoder", "decoder"}:
            return [roles[r] for r in ("encoder", "decoder") if self.sequence in (r, "both")]
        if len(found) > 1:
            paths = ", ".join(repr(tower.trunk.path) for tower in found)
            raise surgery.SiteError(
                f"method 'prompt': several modules embed token ids ({paths}). Choose one, as with "
                "at=surgery.locate(model).where(lambda site: site.path.startswith(...))."
            )
        if found[0].trunk.role == "encoder":
            raise surgery.SiteError(
                f"method 'prompt': a decoder reads what {found[0].trunk.path!r} makes of a longer "
                "sequence, and the selection leaves it out. Splice without at=; the option "
                "sequence= says where the rows go."
            )
        return found

    def splice(self, site: surgery.OpenSite) -> None:
        found = towers(site.chosen)
        own = {tower.trunk.path: tower for tower in self.own(found)}
        tower = next(t for t in found if any(s.identity == site.identity for s in t.sites))
        if tower.trunk.path in own:
            self.insert(site, tower)
        if site.kind == "trunk" and site.role == "decoder":
            for path, other in own.items():
                if other.trunk.role == "encoder":
                    wrap = Memory(self.prompt(site, path), site.memory, site.ids)
                    site.port("call").wrap(wrap, name=f"{self.name}_memory")

    def prompt(self, site: surgery.OpenSite, trunk: str) -> Any:
        """Return the prompt of a trunk, or a reference to it."""
        return site.share(f"prompt {trunk}", lambda: self.rows(site.width))

    def insert(self, site: surgery.OpenSite, tower: Tower) -> None:
        """Insert the prompt's part at one site of its tower."""
        prompt = self.prompt(site, tower.trunk.path)
        if site.kind == "attention":
            reads = ("merged", "query_heads", "lse", "key_heads", "value_heads")
            site.port("merged").replace(Attend(prompt, site), name=self.name, reads=reads)
        elif site.kind == "position":
            site.port("positions").insert(Later(prompt), name=self.name)
        elif site.kind == "embedding":
            if self.init == "vocabulary":
                own: Prompt = prompt if isinstance(prompt, Prompt) else prompt.module
                own.start_from(site.base().weight)
            site.port("output").insert(Embed(prompt), name=self.name)
        elif site.kind == "stack":
            site.port("call").wrap(Cut(prompt), name=f"{self.name}_cut")
        elif tower.alone:
            settings = {n: x for n, x in site.call.items() if not isinstance(x, Tensor)}
            require_callable(site)
            wrap: nn.Module = Alone(prompt, site.ids, site.base(), settings)
            site.port("call").wrap(wrap, name=self.name)
        else:
            wrap = InFront(prompt, site.ids, site.base(), site.memory)
            site.port("call").wrap(wrap, name=self.name)


def require_callable(trunk: surgery.OpenSite) -> None:
    """Raise unless the trunk can be called with the prompt's tokens alone."""
    module = trunk.base()
    parameters = inspect.signature(type(module).forward).parameters.values()
    needed = [
        p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    lacking = [n for n in needed[1:] if n != trunk.ids and isinstance(trunk.call.get(n), Tensor)]
    if lacking:
        raise surgery.SiteError(
            f"method 'prompt': {type(module).__name__} cannot be called with {trunk.ids!r} alone "
            f"({', '.join(lacking)} must be given), so a prompt cannot run by itself. Splice into "
            "its language model."
        )


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    register(PromptTuning)
