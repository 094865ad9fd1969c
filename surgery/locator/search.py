"""Find every site of a model by the dataflow of one run.

    model, example inputs
      |  observation.py      run the model once; record it as one flat graph in which every node
      |                      knows the module that made it
      v
    Observation              the graph, and the arguments that each module was first called with;
      |                      idle_experts.py runs the experts that got no token
      |  patterns/           match attention, FFN and single projections in the graph
      v
    list[Match]
      |  host_choice.py      choose the host of each match
      |  pattern_sites.py    describe each match as a Site with its ports
      |  module_sites.py     add the sites that are one module: norm, position, embedding
      |  experts_sites.py    add the modules with the stacked weights of experts
      |  call_sites.py       add the sites that wrap a module's call: block, stack, trunk
      |  tellers.py          note whose call tells of the tokens of a site
      |  overlooked.py       name the projections and modules that no site reaches
      v
    Sites

The *host* of a match is the smallest module that contains all of it, output projection included.
A splice captures and rewrites the host's forward; inside the host it traces through the modules on
the way to the site and keeps all others whole. Names of modules and classes play no role.

The observation, its graph and its matches live as long as the call of :func:`locate`. A site keeps
the arguments of its host (``HostPlan``), with which a splice captures the host.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from surgery.errors import SiteError
from surgery.interop import example_inputs as made_inputs
from surgery.interop import (
    exclusively,
    explained_out_of_reach,
    huggingface,
    leaves,
    outside_inference_mode,
)
from surgery.locator.call_sites import call_sites, positions_of_tokens
from surgery.locator.experts_sites import experts_sites
from surgery.locator.gradient_reach import why_untrained
from surgery.locator.host_choice import Group, groups_of, host_of
from surgery.locator.module_sites import module_sites
from surgery.locator.observation import observe
from surgery.locator.overlooked import overlooked
from surgery.locator.pattern_sites import batches_marked, pattern_site
from surgery.locator.run_record import Observation
from surgery.locator.shared_weights import shares_noted, ties_noted
from surgery.locator.tellers import with_tellers
from surgery.patterns import (
    Match,
    find_matches,
    innermost,
    joins_residual,
    linear_matches,
    place,
    value,
)
from surgery.plugin import Site, Sites


@outside_inference_mode
@explained_out_of_reach
def locate(model: nn.Module, example_inputs: Any = None) -> Sites:
    """Find every attention and FFN of a model.

    Args:
        model: any ``nn.Module``. It runs once, in evaluation mode, and is not changed: no hook
            fires, no random number is drawn, no gradient is left behind.
        example_inputs: the arguments of that run: a dict of keyword arguments, a tuple of
            positional ones, or one tensor. May be left out where the library says what a model
            takes: transformers, timm, sentence-transformers, torchvision's transformer.

    Returns:
        The sites, in the order of the computation; ``print`` shows them.

    Raises:
        SiteError: the run reaches no site, the model's inputs are unknown, or its forward calls a
            function that torch.compile has to compile.

    Example:
        ``sites = surgery.locate(model)``; ``print(sites.attention.layers(0, 2))``
    """
    args, kwargs = _call(model, example_inputs)
    observation = _observed(model, args, kwargs)
    found = find_matches(observation.graph, model)
    found = [match for match in found if not _in_experts(match, observation, model)]
    matches = _unique(found, model)
    kept = _kept(found, matches)
    linear = _linear(kept, observation, model)
    if not matches and not linear:
        raise SiteError(
            f"no site in {type(model).__name__}: no attention (query-key product, softmax), "
            "no FFN (projection, nonlinearity, projection, residual) and no linear layer runs "
            "here. Pass example_inputs= that reach them."
        )
    groups = groups_of(matches, observation, model)
    why = why_untrained(observation)
    group_of = {id(match): group for group in groups for match in group.matches}
    sites = [
        dataclasses.replace(
            pattern_site(match, group, observation.calls[group.path], model),
            untrained=why(match, group.path),
        )
        for match in matches
        if (group := group_of[id(match)])
    ]
    given = [x for x in leaves((args, kwargs)) if isinstance(x, Tensor)]
    ids = [x for x in given if not x.is_floating_point()]
    others = positions_of_tokens(module_sites(model, observation, ids), sites)
    others += experts_sites(model, observation)
    others += call_sites(model, observation, sites, others)
    sites, others = batches_marked(shares_noted(sites), ties_noted(linear + others, model))
    told = with_tellers([*sites, *others], model, observation)
    sites, others = told[: len(sites)], told[len(sites) :]
    return Sites(
        sites,
        type(model).__name__,
        others,
        overlooked(model, observation, kept, sites),
    )


def _call(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments of the run."""
    if example_inputs is None:
        example_inputs = made_inputs(model)
    if example_inputs is None:
        raise SiteError(
            f"the inputs of {type(model).__name__} are unknown. Pass example_inputs=: "
            "a dict of keyword arguments, a tuple of positional ones, or a tensor."
        )
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)), {}


def _observed(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Observation:
    """Run the model and record the run."""
    own = huggingface.attention_patch, huggingface.is_own_hook
    try:
        return exclusively(lambda: observe(model, args, kwargs, *own))
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        if not any(f.f_globals.get("__name__", "").startswith("torch._dynamo") for f in frames):
            raise
        raise SiteError(
            f"the forward of {type(model).__name__} calls a function that is compiled as it runs, "
            "such as flex_attention, and a run cannot be recorded through it. Nothing has changed. "
            "Choose another attention implementation for this model (SDPA or eager)."
        ) from error


def _linear(found: list[Match], observation: Observation, model: nn.Module) -> list[Site]:
    """Return the sites of projections outside attention and FFN; each is its own host."""
    matches = {m.key: m for m in linear_matches(observation.graph, model, found) if m.key}
    return [
        pattern_site(match, Group(path, [match]), observation.calls[path], model)
        for path, match in matches.items()
    ]


def _kept(found: list[Match], matches: list[Match]) -> list[Match]:
    """Return the matches of every call of the sites that are kept."""
    sites = {(m.kind, m.key) for m in matches}
    return [m for m in found if (m.kind, m.key) in sites]


def _in_experts(match: Match, observation: Observation, model: nn.Module) -> bool:
    """Whether an FFN lies in an expert, or has a mixture of experts as its host.

    The mixture is one site, and its host keeps it whole.
    """
    if match.kind != "ffn" or not observation.experts:
        return False
    within = any(innermost(place(node), observation.experts) for node in match.nodes)
    return within or host_of(match, observation, model) in observation.mixtures


def _unique(matches: list[Match], model: nn.Module) -> list[Match]:
    """Keep the first match of each site, however often the model calls it.

    Matches that look like an FFN but join no residual stream are dropped, and so are sites that no
    token of the example reaches (an expert that the router did not choose, for example).
    """
    unique: dict[tuple[str, str], Match] = {}
    for match in matches:
        if match.kind == "ffn" and not joins_residual(match, model):
            continue
        if not value(match.ports["output"].node).numel():
            continue
        unique.setdefault((match.kind, match.key), match)
    return list(unique.values())
