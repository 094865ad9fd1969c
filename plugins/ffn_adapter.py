"""Insert a small network, a bottleneck adapter, after a sub-layer or beside the FFN.

    A(h) = f(LN(h) W_d + b_d) W_u + b_u                  f is relu by default; LN only with
                                                         ``layer_norm``
    houlsby     a := a + A1(a), m := m + A2(m)           after attention and after the FFN
    attention   a := a + A(a)                            after attention only
    pfeiffer    m := m + A(m)                            after the FFN only
    parallel    m := m + s A(u)                          u is the input of the FFN
    block       x := x + A(x)                            x is the output of the whole block

a and m are the outputs of attention and FFN before they join the residual stream; every placement
takes the scale s. Sources: Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021,
arXiv:2005.00247; He et al. 2022, arXiv:2110.04366, for ``parallel`` and s; Lin et al. 2020,
arXiv:2004.03829, for ``block``. In post-norm models Pfeiffer's release puts the adapter after the
residual and norm; here it stands before them in every model. Adapter-108, the baseline of the
inducer paper (Chen et al. 2022, arXiv:2210.14469), is ``attention`` with ``layer_norm``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery

Placement = Literal["houlsby", "attention", "pfeiffer", "parallel", "block"]
Activation = Literal["relu", "gelu", "silu", "tanh"]
FUNCTIONS = {"relu": torch.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
SITES = {
    "houlsby": ("attention", "ffn"),
    "attention": ("attention",),
    "pfeiffer": ("ffn",),
    "parallel": ("ffn",),
    "block": ("block",),
}


class Bottleneck(nn.Module):
    """Compute s A(h), which the splice adds to a port.

    Args:
        width, rank: D and the inner width r.
        scale: s; ``"learned"`` makes s a parameter that starts at 1.
        layer_norm: whether A has a LayerNorm for its input.
        dropout: probability, after f.
        init: ``zero`` or ``normal``, see Parameters.
        activation: f.

    Shape:
        h (B, n, D) -> (B, n, D)
    Parameters:
        down.weight (r, D)  down.bias (r,)  up.weight (D, r)  up.bias (D,)  [norm: 2 D]  [scale: 1]
        zero: down Kaiming-uniform with a = sqrt(5), up and biases 0: starts equal to the base
        normal: weights N(0, 0.02), biases 0: starts near the base
    Cost: 2 D r + r + D [+ 2 D] [+ 1] parameters.
    """

    def __init__(
        self,
        width: int,
        rank: int,
        scale: float | Literal["learned"],
        layer_norm: bool,
        dropout: float,
        init: str,
        activation: Activation,
    ) -> None:
        super().__init__()
        self.function = FUNCTIONS[activation]
        self.norm = nn.LayerNorm(width) if layer_norm else nn.Identity()
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        self.dropout = surgery.Dropout(dropout)
        self.scale: float | nn.Parameter = (
            nn.Parameter(torch.ones(())) if scale == "learned" else float(scale)
        )
        for layer in (self.down, self.up):
            nn.init.zeros_(layer.bias)
            nn.init.normal_(layer.weight, std=0.02)
        if init == "zero":
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up.weight)

    def forward(self, h: Tensor) -> Tensor:
        hidden = self.dropout(self.function(self.down(self.norm(h))))  # (B, n, r)
        out: Tensor = self.up(hidden)
        return out * self.scale


class After(nn.Module):
    """Wrap the call of a block: x (B, n, D), its first output, becomes ``x + s A(x)``."""

    def __init__(self, adapter: Bottleneck) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, forward: Any, **arguments: Any) -> Any:
        out = forward(**arguments)
        x = out[0] if isinstance(out, tuple) else out
        update = self.adapter(x.to(self.adapter.down.weight.dtype))
        x = x + update.to(x.dtype)
        return (x, *out[1:]) if isinstance(out, tuple) else x


@dataclass(frozen=True)
class FFNAdapter(surgery.Method):
    """Insert bottleneck adapters after sub-layers or beside the FFN.

    Args:
        rank: inner width r, at least 1.
        placement: ``houlsby``, ``attention``, ``pfeiffer``, ``parallel`` or ``block``, see the top
            of this file.
        scale: s, a number, or ``"learned"`` (starts at 1). He et al. use 4 (XSum) and 2 (GLUE).
        layer_norm: whether the adapter has a LayerNorm for its input.
        dropout: probability, after f.
        init: ``zero`` starts exactly at the base model, ``normal`` near it.
        activation: f: ``relu``, ``gelu``, ``silu`` or ``tanh``.

    Start: exact; with ``init="normal"`` none. Not mergeable. The keys and values of a layer are
    computed as in the base. Cost: 2 D r + r + D [+ 2 D] [+ 1] per adapter.

    Raises:
        MethodError: an option is out of range.
    """

    name = "ffn_adapter"
    kinds = ("attention", "ffn", "block")
    size = ("rank",)

    rank: int = 64
    placement: Placement = "parallel"
    scale: float | Literal["learned"] = 1.0
    layer_norm: bool = False
    dropout: float = 0.0
    init: Literal["zero", "normal"] = "zero"
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        self.require(isinstance(self.rank, int) and self.rank >= 1, "rank", "an integer >= 1")
        self.require(self.placement in SITES, "placement", f"one of {', '.join(SITES)}")
        number = isinstance(self.scale, (int, float)) and math.isfinite(self.scale)
        valid = self.scale == "learned" or (number and self.scale != 0)
        self.require(valid, "scale", "a number other than 0, or 'learned'")
        self.require(0 <= self.dropout < 1, "dropout", "in [0, 1)")
        self.require(self.init in ("zero", "normal"), "init", "'zero' or 'normal'")
        self.require(self.activation in FUNCTIONS, "activation", f"one of {', '.join(FUNCTIONS)}")

    @property
    def start(self) -> surgery.Start:
        return "exact" if self.init == "zero" else "none"

    def suits(self, site: surgery.Site) -> bool:
        return site.kind in SITES[self.placement]

    def splice(self, site: surgery.OpenSite) -> None:
        options = self.scale, self.layer_norm, self.dropout, self.init, self.activation
        adapter = Bottleneck(site.width, self.rank, *options)
        if self.placement == "block":
            site.port("call").wrap(After(adapter), name=self.name)
            return
        read = "input" if self.placement == "parallel" else "output"
        site.port("output").add(adapter, name=self.name, reads=(read,))


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    register(FFNAdapter)
