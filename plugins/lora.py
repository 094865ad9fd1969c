"""Update frozen projections by low-rank products (LoRA).

    y = x W + b + s (drop(x) A B + c)            s = alpha / r, or alpha / sqrt(r) with ``rslora``

Hu et al. 2021, arXiv:2106.09685, eq. 3; rank-stabilised scaling: Kalajdzievski 2023,
arXiv:2312.03732. The trainable bias c is an option of the inducer paper's code (Chen et al. 2022,
arXiv:2210.14469), which also multiplies it by s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from surgery_plugins.lora_options import PROJECTIONS, LowRankMethod
from surgery_plugins.lora_updates import LowRankExperts, LowRankRows, low_rank_convolution


class LowRank(nn.Module):
    """Compute s (drop(x) A B + c), which the splice adds to the projection's output.

    Args:
        d_in, d_out: widths of the projection that it updates.
        rank: inner width r.
        scale: s.
        dropout: probability, on the input of A.
        bias: whether to add c.

    Shape:
        x (B, n, d_in), onto (B, n, d_out) or None -> (B, n, d_out)
    Parameters:
        a (rank, d_in)   A transposed: Kaiming-uniform with a = sqrt(5), as in the authors' loralib
        b (rank, d_out)  B: zeros, so the spliced model starts equal to the base
        bias (d_out,)    c: zeros, if ``bias``
    Cost: rank * (d_in + d_out) [+ d_out] parameters.
    """

    def __init__(
        self, d_in: int, d_out: int, rank: int, scale: float, dropout: float, bias: bool
    ) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = surgery.Dropout(dropout)
        self.a = nn.Parameter(torch.empty(rank, d_in))
        self.b = nn.Parameter(torch.zeros(rank, d_out))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    @property
    def needs_bias(self) -> bool:
        """Whether merging needs a bias on the projection, to take up c."""
        return self.bias is not None

    def fast_parameters(self) -> set[str]:
        """Name B to LoRA+."""
        return {"b"}

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return ``(W + s A B, b + s c)``, W (d_in, d_out)."""
        if bias is not None and self.bias is not None:
            bias = bias + self.scale * self.bias.to(bias)
        return weight + self.scale * (self.a.to(weight).T @ self.b.to(weight)), bias

    def low_rank_factors(self) -> tuple[Tensor, Tensor, float] | None:
        """Return A, B and s; None beside a bias."""
        return None if self.bias is not None else (self.a, self.b, self.scale)

    def set_low_rank_factors(self, a: Tensor, b: Tensor) -> None:
        with torch.no_grad():
            self.a.copy_(a)
            self.b.copy_(b)

    def divided_axes(self, side: str) -> dict[str, int]:
        """Divide A with the input of the projection, or B and c with its output."""
        return {"a": 1} if side == "input" else {"b": 1, "bias": 0}

    @staticmethod
    def forward_grouped(
        modules: Sequence[LowRank], x: Tensor, onto: Tensor | None = None
    ) -> Tensor | None:
        """Return the updates of the rows of several modules by two grouped products.

            s_e x_e A_e B_e         x_e (m, d_in): the rows of module e

        Smaller ranks are filled up with zeros. None beside dropout or a bias, or where tensor
        parallelism has divided them.
        """
        if any(
            _is_divided(m.a) or m.bias is not None or (m.training and m.dropout.p) for m in modules
        ):
            return None
        a, b = _stacked([m.a for m in modules]), _stacked([m.b for m in modules])
        hidden = torch.bmm(x.reshape(len(modules), -1, x.shape[-1]), a.transpose(1, 2))
        scales = [m.scale for m in modules]
        if len({*scales}) > 1:
            hidden = hidden * hidden.new_tensor(scales).view(-1, 1, 1)
            scales = [1.0]
        if onto is not None and onto.dtype == hidden.dtype:
            whole = onto.reshape(len(modules), -1, onto.shape[-1])
            return torch.baddbmm(whole, hidden, b, alpha=scales[0]).view(onto.shape)
        out = torch.bmm(hidden * scales[0], b).view(*x.shape[:-1], -1)
        return out if onto is None else onto + out.to(onto.dtype)

    def first_factor(self) -> Tensor | None:
        """Return A; None where it is divided, or under dropout, whose masks differ by module."""
        a = self.a  # looked up once: each token that is decoded asks
        return None if (self.training and self.dropout.p) or _is_divided(a) else a

    def after_product(self, hidden: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return the update from ``hidden = x A``, or its sum with ``onto``."""
        return self._added(hidden, onto, self.b, self.bias)

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return the update, or its sum with ``onto``."""
        x = self.dropout(x)
        if not _is_divided(self.a):
            return self.after_product(F.linear(x, self.a), onto)
        hidden = surgery.sum_between(F.linear(x, surgery.own_part(self.a)), self.a, self.b)
        return self._added(hidden, onto, surgery.own_part(self.b), surgery.own_part(self.bias))

    def _added(self, hidden: Tensor, onto: Tensor | None, b: Tensor, bias: Tensor | None) -> Tensor:
        out = surgery.add_product(onto, hidden, b, self.scale)
        return out if bias is None else out + self.scale * bias.to(out.dtype)


def _is_divided(factor: Tensor) -> bool:
    """Whether tensor parallelism holds a factor; a plain parameter is told at once."""
    return type(factor) is not nn.Parameter and surgery.own_part(factor) is not factor


def _stacked(factors: list[Tensor]) -> Tensor:
    """Return factors (r, width) as one tensor (E, R, width); R is the largest r."""
    rank = max(map(len, factors))
    wide = [f if len(f) == rank else F.pad(f, (0, 0, 0, rank - len(f))) for f in factors]
    return torch.stack(wide)


@dataclass(frozen=True)
class LoRA(LowRankMethod):
    """Add a low-rank update to projections of attention or FFN, and to other maps that are named.

    In a fused projection only the columns of the named ports are updated. Linear layers outside
    attention and FFN, convolutions and the embedding are updated where ``at`` holds them:
    ``at=sites + sites.embedding`` with ``ports=("query", "value", "rows")``.

    Args:
        rank: inner width r, at least 1.
        alpha: numerator of the scale s.
        rslora: s = alpha / sqrt(r) instead of alpha / r.
        ranks: other ranks for some projections, as ``{"layers.0.": 16, "mlp": 4, "q_proj": 2}``:
            regular expressions that are searched for in the path of the site, and of the module
            that makes the projection, or of the weights of experts; the first that is found gives
            the rank, and before all the whole path of the module. They are of a kind that ends soon
            in any path (see ``surgery.are_quick_patterns``).
        alphas: other numerators for some projections, likewise.
        fused: whether the ports of one fused projection share A, as one update of the whole
            projection does.
        ports: the projections: query, key, value, output (attention); up, gate, output (FFN);
            output (linear, convolution); rows (embedding); up, gate, output (experts). ``output``
            beside other ports is the output of their kind of site; alone it is that of every kind.
            ``"all"`` is every projection that a site has. What a site lacks is left out there, and
            the report names it. Where ``Sites.matching`` has picked projections, it is those
            instead.
        dropout: probability, on the input of A; it leaves out embeddings and experts, which have
            no such input.
        bias: whether to add a trainable bias, scaled as the product is; not for an embedding or
            experts.
        across_groups: whether the update of a convolution with groups reads the channels of all
            groups, as PEFT's does: A (rank, in, h, w), and B in groups, which must divide the rank.
            Such an update cannot be merged. By default the groups share one A, each for its own
            channels.

    Start: exact. Mergeable. Cost: rank * (d_in + d_out) [+ d_out] per projection.

    Raises:
        MethodError: an option is out of range.
        PortError: a port is unknown.
    """

    name = "lora"
    projections = PROJECTIONS
    size = ("rank",)

    bias: bool = False
    across_groups: bool = False

    def check(self, sites: list[surgery.Site]) -> None:
        kinds = {site.kind for site in sites}
        for kind in sorted(kinds & {"embedding", "experts"}):
            self.require(not self.bias, "bias", f"False at sites of kind {kind!r}")
            alone = kinds <= {"embedding", "experts"}
            self.require(not (self.dropout and alone), "dropout", f"0 at sites of kind {kind!r}")

    def splice(self, site: surgery.OpenSite) -> None:
        whole: dict[str, LowRank] = {}  # the first update of each fused projection
        for port in site.select(self.present_ports(site)):
            assert port.in_width is not None
            rank, scale = self.rank_and_scale(site, port)
            if site.kind == "embedding":
                rows = LowRankRows(port.in_width, port.width, rank, scale, site.base().padding_idx)
                port.add(rows, name=self.name, reads=("ids",))
            elif site.kind == "convolution":
                options = rank, scale, self.dropout, self.bias
                kernel = low_rank_convolution(site.base(), self.across_groups, *options)
                port.add(kernel, name=self.name, reads=("input",))
            elif site.kind == "experts":
                stack = port.parameter()
                widths = len(stack()), port.in_width, port.width
                experts = LowRankExperts(stack, port.transposed, *widths, rank, scale)
                port.wrap(experts, name=self.name)
            else:
                update = LowRank(port.in_width, port.width, rank, scale, self.dropout, self.bias)
                if self.fused and port.module:
                    update.a = whole.setdefault(port.module, update).a
                port.add(update, name=self.name)


@surgery.hookimpl
def register_methods(register: surgery.Register) -> None:
    register(LoRA)
