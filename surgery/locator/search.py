"""Locate: the attention and FFN sites of any model, by dataflow.

One run of the model on small example inputs shows every site (patterns/). A site's *host* is
the smallest module that contains it whole, output projection included; inside it only the modules
on the way to the site are traced through. Names of modules and classes play no role.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from surgery.errors import SiteError
from surgery.interop import huggingface, leaves
from surgery.locator.call_sites import call_sites
from surgery.locator.module_sites import module_sites
from surgery.locator.observation import Observation, observe
from surgery.locator.pattern_sites import Group, groups_of, pattern_site
from surgery.patterns import (
    Match,
    find_matches,
    joins_residual,
    linear_matches,
    value,
)
from surgery.plugin import Site, Sites


def locate(model: nn.Module, example_inputs: Any = None) -> Sites:
    """Find every attention and FFN of a model.

    Args:
        model: any ``nn.Module``. It runs once, in evaluation mode, and is not changed: no hook
            fires, no random number is drawn, no gradient is left behind.
        example_inputs: what to call it with: a dict of keyword arguments, a tuple of positional
            ones, or one tensor. For a transformers model it can be left out.

    Returns:
        the sites, in the order of the computation. ``print`` them.

    Raises:
        SiteError: there is no site, or no example input could be made.
    """
    args, kwargs = _call(model, example_inputs)
    observation = observe(model, args, kwargs, huggingface.attention_patch, huggingface.is_own_hook)
    found = find_matches(observation.graph, model)
    matches = _unique(found, model)
    linear = _linear(found, observation, model)
    if not matches and not linear:
        raise SiteError(
            f"no site in {type(model).__name__}: no attention (query-key product, softmax), "
            "no FFN (projection, nonlinearity, projection, residual) and no linear layer runs "
            "here. Pass example_inputs= that reach them."
        )
    groups = groups_of(matches, observation, model)
    sites = [
        pattern_site(match, group, observation.calls[group.path], model)
        for match in matches
        for group in groups
        if match in group.matches
    ]
    given = [x for x in leaves((args, kwargs)) if isinstance(x, Tensor)]
    whole = [x for x in given if not x.is_floating_point()]
    others = module_sites(model, observation, whole)
    others += call_sites(model, observation, sites, others)
    return Sites(sites, type(model).__name__, linear + others)


def _call(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example_inputs is None:
        example_inputs = huggingface.example_inputs(model)
    if example_inputs is None:
        raise SiteError(
            f"{type(model).__name__} does not tell what its inputs are. Pass example_inputs=: "
            "a dict of keyword arguments, a tuple of positional ones, or a tensor."
        )
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)), {}


def _linear(found: list[Match], observation: Observation, model: nn.Module) -> list[Site]:
    """Linear sites; each projection is the host of its own."""
    matches = {p.key: p for p in linear_matches(observation.graph, model, found) if p.key}
    return [
        pattern_site(match, Group(path, [match]), observation.calls[path], model)
        for path, match in matches.items()
    ]


def _unique(matches: list[Match], model: nn.Module) -> list[Match]:
    """Each site once, however often the model calls it."""
    found: dict[tuple[str, str], Match] = {}
    for match in matches:
        if match.kind == "ffn" and not joins_residual(match, model):
            continue
        if not value(match.ports["output"].node).numel():  # no token comes by in this example
            continue
        found.setdefault((match.kind, match.key), match)
    return list(found.values())
