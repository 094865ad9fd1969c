"""Combine several splices into a new one: their updates summed, averaged, or merged by sign.

    average     p = sum_i w_i p_i, for each parameter of any method
    cat         D = sum_i w_i D_i, exactly; the rank is the sum of the ranks
    svd         the best D of a given rank; Eckart and Young 1936
    linear      A = sum_i sign(w_i) sqrt|w_i s_i| A_i, B = sum_i sqrt|w_i s_i| B_i
    magnitude   linear, of the largest values of each A_i and B_i
    dare        linear, of values drawn at random and rescaled; Yu et al. 2023, arXiv:2311.03099
    ties        of the largest values, those that agree in sign with the sum, averaged;
                Yadav et al. 2023, arXiv:2306.01708
    dare_ties   ties, of values drawn at random

D_i = s_i A_i^T B_i is the update of splice i (module protocol ``Factored``). The formulas of all
but ``average`` are those of PEFT's ``add_weighted_adapter``, so that results agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from surgery.errors import SpliceError, shown, suggest
from surgery.interop import is_sharded, outside_inference_mode, require_no_engine
from surgery.plugin import Factored, Method
from surgery.splicer import (
    Report,
    add_beside,
    atomically,
    copies,
    rehearse,
    reports,
    require_free,
    require_spliced,
    spliced_model,
)

How = Literal["linear", "cat", "svd", "average", "magnitude", "dare", "ties", "dare_ties"]
Pair = tuple[Tensor, Tensor]


@outside_inference_mode
def combine(
    model: nn.Module,
    names: Mapping[str, float] | Sequence[str],
    new: str,
    how: How = "linear",
    rank: int | None = None,
    density: float | None = None,
) -> Report:
    """Combine splices into a new one, which is switched off and frozen, as a copy is.

    Args:
        model: a spliced model.
        names: the splices, of one method at the same sites, with their weights w; names alone have
            weights 1 / n.
        new: the name of the new splice.
        how: the formula, see the top of this file. ``average`` serves every method, the others
            serve LoRA.
        rank: of ``svd``; by default the largest rank of the splices.
        density: of ``magnitude``, ``dare``, ``ties`` and ``dare_ties``: the share of values kept.

    Returns:
        the report of the new splice.

    Raises:
        SpliceError: the splices differ in methods, sites or shapes, or the formula does not suit
            them. Nothing has changed.

    Example:
        ``surgery.combine(model, {"math": 0.7, "code": 0.3}, "both", how="ties", density=0.2)``,
        then ``surgery.use(model, "both")``
    """
    whole = spliced_model(model)
    weights = dict(names) if isinstance(names, Mapping) else {n: 1 / len(names) for n in names}
    require_spliced(whole, *weights)
    if len(weights) < len(names):
        raise SpliceError(
            f"{shown(names)} has a splice twice. Give weights by name, as {{'a': 2}}."
        )
    require_free(whole, new)
    require_no_engine(whole, "combine")
    _check_options(how, weights, rank, density)
    chosen = [reports(whole)[name] for name in weights]
    _require_alike(chosen)
    columns = zip(*([whole.get_submodule(i.path) for i in r.inserted] for r in chosen), strict=True)
    groups = [list(group) for group in columns]
    scales = list(weights.values())
    if how == "average":
        _require_same_options(chosen)
        made, methods = _averaged(whole, groups, scales), chosen[0].methods
    else:
        pairs = [_combined(group, scales, how, rank, density) for group in groups]
        made, methods = _built(whole, chosen[0], pairs)
    return atomically(whole, lambda _: add_beside(whole, chosen[0], new, made, methods))


def _check_options(how: str, weights: dict[str, float], rank: Any, density: Any) -> None:
    """Raise unless the formula is known and has the options that it takes."""
    sparse = how in ("magnitude", "dare", "ties", "dare_ties")
    wrong = ""
    if how not in get_args(How):
        known = ", ".join(get_args(How))
        wrong = f"how={shown(how)} is none of {known}. {suggest(str(how), get_args(How))}"
    elif not weights or not all(math.isfinite(w) for w in weights.values()):
        wrong = f"the weights {shown(weights)} are not finite numbers, one for each splice. "
    elif sparse and not (isinstance(density, (int, float)) and 0 < density <= 1):
        wrong = f"how={how!r} needs density=, the share of values kept, in (0, 1]. "
    elif (density is not None and not sparse) or (rank is not None and how != "svd"):
        wrong = f"how={how!r} takes no {'rank' if rank is not None else 'density'}. "
    elif rank is not None and not (isinstance(rank, int) and rank >= 1):
        wrong = f"rank={shown(rank)} must be an integer >= 1. "
    if wrong:
        raise SpliceError(f"splices cannot be combined: {wrong.strip()} Nothing has changed.")


def _require_alike(chosen: list[Report]) -> None:
    """Raise unless these splices have modules of one kind at the same places, in one order."""
    for report in chosen:
        if report.merged:
            raise SpliceError(f"splice {report.name!r} is partly merged. Combine before merging.")
        places = [
            [(i.site.identity, i.edit.port, i.edit.verb, i.method.name) for i in r.inserted]
            for r in (chosen[0], report)
        ]
        if places[0] != places[1]:
            raise SpliceError(
                f"splices {chosen[0].name!r} and {report.name!r} differ in their methods, sites or "
                "ports, so they have no common combination. surgery.use(model, {...}) runs both."
            )


def _require_same_options(chosen: list[Report]) -> None:
    """Raise unless these splices have the same options: one set of parameters means one thing."""
    options = [repr(report.methods) for report in chosen]
    for report, own in zip(chosen, options, strict=True):
        if own != options[0]:
            raise SpliceError(
                f"splices {chosen[0].name!r} and {report.name!r} differ in their options, as in "
                f"alpha, so averaged parameters would mean something else: {options[0]} and {own}. "
                "For LoRA use how='linear', 'svd' or 'cat'."
            )


def _averaged(model: nn.Module, groups: list[list[nn.Module]], weights: list[float]) -> Any:
    """Return copies of the first modules with the averages of all parameters and buffers."""
    made = copies([group[0] for group in groups], model)
    with torch.no_grad():
        for module, group in zip(made, groups, strict=True):
            states = [each.state_dict() for each in group]
            for key, target in module.state_dict().items():
                parts = [state.get(key) for state in states]
                if any(part is None or part.shape != target.shape for part in parts):
                    raise SpliceError(
                        f"{key} of {type(module).__name__} differs in shape between the "
                        "splices, so it has no average. For LoRA of several ranks use how='svd'."
                    )
                if target.is_floating_point():
                    target.copy_(
                        sum(w * cast(Tensor, p) for w, p in zip(weights, parts, strict=True))
                    )
    return made


def _combined(
    group: list[nn.Module], weights: list[float], how: str, rank: int | None, density: float | None
) -> Pair:
    """Return A (r, in) and B (r, out) of the combination of some modules' updates."""
    factors: list[Pair] = []
    scaled: list[float] = []
    for module, weight in zip(group, weights, strict=True):
        found = module.low_rank_factors() if isinstance(module, Factored) else None
        if found is None:
            raise SpliceError(
                f"{type(module).__name__} is no plain low-rank product, so how={how!r} does not "
                "suit it. how='average' serves every method."
            )
        a, b, scale = found
        if is_sharded(a) or is_sharded(b):
            raise SpliceError(
                f"each process has a part of these splices, and how={how!r} needs them whole. "
                "how='average' does not. Or save them, combine them in one process, save the new "
                "splice there and load it here."
            )
        factors.append((a.detach(), b.detach()))
        scaled.append(weight * scale)
    if how == "cat":
        a = torch.cat([w * a for w, (a, _) in zip(scaled, factors, strict=True)])
        return a, torch.cat([b for _, b in factors])
    if how == "svd":
        update = sum(w * (a.T @ b).double() for w, (a, b) in zip(scaled, factors, strict=True))
        r = min(rank or max(len(a) for a, _ in factors), *cast(Tensor, update).shape)
        u, s, v = torch.linalg.svd(cast(Tensor, update), full_matrices=False)
        a, b = u[:, :r].T, s[:r, None] * v[:r]
        return a.to(factors[0][0]), b.to(factors[0][1])
    if len({a.shape for a, _ in factors}) > 1:
        raise SpliceError(f"how={how!r} needs one rank for all splices. Use how='svd' or 'cat'.")
    roots = [math.sqrt(abs(w)) for w in scaled]
    signed = [math.copysign(root, w) for root, w in zip(roots, scaled, strict=True)]
    a = _MERGED[how](torch.stack([a for a, _ in factors]), _column(signed), density)
    b = _MERGED[how](torch.stack([b for _, b in factors]), _column(roots), density)
    return a, b


def _column(weights: list[float]) -> Tensor:
    return torch.tensor(weights).view(-1, 1, 1)


def _linear(x: Tensor, weights: Tensor, density: Any) -> Tensor:
    return (x * weights.to(x)).sum(0)


def _largest(x: Tensor, density: float) -> Tensor:
    """Return x (splices, r, n) with the values of largest magnitude of each splice, others 0."""
    flat = x.flatten(1)
    keep = flat.abs().topk(int(density * flat.shape[1])).indices
    return torch.zeros_like(flat).scatter(1, keep, flat.gather(1, keep)).view_as(x)


def _drawn(x: Tensor, density: float) -> Tensor:
    """Return x with a random share of its values, rescaled by 1 / density; others 0."""
    return x * torch.bernoulli(torch.full_like(x, density)) / density


def _agreeing(x: Tensor, weights: Tensor, density: Any) -> Tensor:
    """Return the mean, over the splices that agree in sign with the sum, of the weighted values."""
    same = x.sign() == torch.where(x.sum(0) >= 0, 1, -1)
    return (x * weights.to(x) * same).sum(0) / same.sum(0).clamp(min=1)


_MERGED: dict[str, Callable[[Tensor, Tensor, Any], Tensor]] = {
    "linear": _linear,
    "magnitude": lambda x, w, density: _linear(_largest(x, density), w, None),
    "dare": lambda x, w, density: _linear(_drawn(x, density), w, None),
    "ties": lambda x, w, density: _agreeing(_largest(x, density), w, None),
    "dare_ties": lambda x, w, density: _agreeing(_drawn(x, density), w, None),
}


def _built(
    model: nn.Module, source: Report, pairs: list[Pair]
) -> tuple[list[nn.Module], tuple[Method, ...]]:
    """Return modules that hold these factors, and the methods that make such modules."""
    ranks = {len(a) for a, _ in pairs}
    if len(ranks) > 1:
        raise SpliceError(
            f"the combination has the ranks {sorted(ranks)} at different sites. Use how='svd' with "
            "rank=, for one rank."
        )
    methods = tuple(method.at_rank(*ranks) for method in source.methods)
    made = [module for _, _, module in rehearse(model, methods, source.sites)]
    for module, (a, b) in zip(made, pairs, strict=True):
        cast(Factored, module.to_empty(device=a.device)).set_low_rank_factors(a, b)
    return made, methods
