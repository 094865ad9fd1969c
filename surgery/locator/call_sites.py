"""Call sites: modules whose call is the port, to be wrapped (see ``Port.wrap``).

trunk    the smallest module from the token ids to all attention
stack    the child of it that holds all attention but not the embedding; else the trunk again
block    the smallest module that holds an attention and an FFN
"""

from __future__ import annotations

from torch import nn

from surgery.interop import by_name, is_whole, leaves, same
from surgery.locator.observation import Observation
from surgery.plugin import HostPlan, Kind, Port, Site


def call_sites(
    model: nn.Module, observation: Observation, sites: list[Site], others: list[Site]
) -> list[Site]:
    """The blocks of a model and, if it embeds tokens at one place, its trunk and its stack."""
    found = [
        _site("block", path, sites[0], model, observation) for path in _blocks(observation, sites)
    ]
    return found + _trunk(model, observation, sites, others)


def _blocks(observation: Observation, sites: list[Site]) -> list[str]:
    """The smallest modules that hold one FFN and some attention."""
    attention = {site.path for site in sites if site.kind == "attention"}
    ffns = [site.path for site in sites if site.kind == "ffn"]
    found: dict[str, None] = {}
    for path in ffns:
        while path and not (path in observation.calls and _inside(path, attention)):
            path = path.rpartition(".")[0]
        if path and len(_inside(path, set(ffns))) == 1:
            found[path] = None
    return list(found)


def _inside(path: str, others: set[str]) -> set[str]:
    return {other for other in others if f"{other}.".startswith(f"{path}.")}


def _trunk(
    model: nn.Module, observation: Observation, sites: list[Site], others: list[Site]
) -> list[Site]:
    """Theirs are the calls by which a sequence can be made longer on its way in, and cut again."""
    embeddings = [site.path for site in others if site.kind == "embedding"]
    attention = [site.path for site in sites if site.kind == "attention"]
    if len(embeddings) != 1 or not attention:
        return []

    def called(path: str) -> str:
        while path not in observation.calls:
            path = path.rpartition(".")[0]
        return path

    trunk = called(common([*attention, *embeddings]))
    below = common(attention).removeprefix(trunk).removeprefix(".").split(".")[0]
    stack = f"{trunk}.{below}" if trunk else below
    whole = below and stack in observation.calls and not embeddings[0].startswith(f"{stack}.")
    # Where they are one module, what cuts must stand inside what makes longer.
    paths: dict[Kind, str] = {"stack": stack if whole else trunk, "trunk": trunk}
    embedding = next(site for site in others if site.kind == "embedding")
    return [_site(kind, path, embedding, model, observation) for kind, path in paths.items()]


def _site(kind: Kind, path: str, like: Site, model: nn.Module, observation: Observation) -> Site:
    call, module = observation.calls[path], model.get_submodule(path)
    plan = HostPlan(path, frozenset(), call.args, call.kwargs)
    named = by_name(type(module).forward, module, call.args, call.kwargs)
    given = (like.host.args, like.host.kwargs) if like.host and like.kind == "embedding" else ()
    tokens = [x for x in leaves(given) if is_whole(x)]
    alike = [n for n, x in named.items() if is_whole(x) and any(same(x, t) for t in tokens)]
    site = Site(
        path, kind, kind, like.width, dtype=like.dtype, device=like.device, host=plan,
        ids=alike[0] if alike else "", call=named,
    )  # fmt: skip
    site.ports["call"] = Port("call", like.width, None)
    return site


def common(paths: list[str]) -> str:
    """The longest module path that all paths lie at or below."""
    split = [path.split(".") if path else [] for path in paths]
    shared: list[str] = []
    for names in zip(*split, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)
