"""Find the sites whose only port is ``call``: a whole module call, to be wrapped (``Port.wrap``).

trunk    the smallest module that contains the embedding and every attention, and is called with
         token ids: around a language model that is called with embeddings, the module that embeds
stack    the trunk's child that contains every attention but not the embedding; the trunk itself
         if no such child is called
block    the smallest module that contains one FFN and at least one attention
"""

from __future__ import annotations

from torch import nn

from surgery.interop import is_integer_tensor, leaves, named_arguments, tensors_equal
from surgery.locator.observation import Observation
from surgery.plugin import HostPlan, Kind, Port, Site


def call_sites(
    model: nn.Module, observation: Observation, sites: list[Site], others: list[Site]
) -> list[Site]:
    """Return the blocks of a model and, if it embeds tokens at one place, its stack and trunk.

    Args:
        sites: the attention and FFN sites.
        others: the sites of :func:`module_sites`, the embedding among them.
    """
    blocks = [
        _site("block", path, sites[0], model, observation) for path in _blocks(observation, sites)
    ]
    return blocks + _stack_and_trunk(model, observation, sites, others)


def _blocks(observation: Observation, sites: list[Site]) -> list[str]:
    """Return the paths of the smallest modules that contain one FFN and at least one attention."""
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
    """Return the paths among ``others`` that are ``path`` or lie below it."""
    return {other for other in others if not path or f"{other}.".startswith(f"{path}.")}


def positions_of_tokens(others: list[Site], sites: list[Site]) -> list[Site]:
    """Return ``others`` without positions that are not those of embedded tokens.

    The positions of tokens are encoded in the smallest module that contains an embedding of tokens
    and an attention. Others are those of patches, in a tower for images.
    """
    attention = {site.path for site in sites if site.kind == "attention"}
    towers = []
    for path in (site.path for site in others if site.kind == "embedding"):
        while path and not _inside(path, attention):
            path = path.rpartition(".")[0]
        towers.append(path)
    return [
        site
        for site in others
        if site.kind != "position" or not towers or any(_inside(t, {site.path}) for t in towers)
    ]


def _stack_and_trunk(
    model: nn.Module, observation: Observation, sites: list[Site], others: list[Site]
) -> list[Site]:
    """Return the stack and the trunk of a model that embeds tokens at one place; else nothing.

    A method can put tokens in front of a sequence at the trunk's call, and take them out of the
    hidden states at the stack's.
    """
    embeddings = [site.path for site in others if site.kind == "embedding"]
    attention = [site.path for site in sites if site.kind == "attention"]
    if len(embeddings) != 1 or not attention:
        return []

    def called(path: str) -> str:
        """Return the nearest module, from ``path`` upwards, that the model calls."""
        while path not in observation.calls:
            path = path.rpartition(".")[0]
        return path

    embedding = next(site for site in others if site.kind == "embedding")
    trunk = called(common_ancestor([*attention, *embeddings]))
    while trunk and not _ids(trunk, embedding, model, observation):  # it is called with embeddings
        trunk = called(trunk.rpartition(".")[0])
    below = common_ancestor(attention).removeprefix(trunk).removeprefix(".").split(".")[0]
    stack = f"{trunk}.{below}" if trunk else below
    separate = below and stack in observation.calls and not embeddings[0].startswith(f"{stack}.")
    # If both are one module, the wrap of the stack must be inside that of the trunk: the sequence
    # is cut before the trunk's wrap returns. The first wrap of a module is the innermost.
    paths: dict[Kind, str] = {"stack": stack if separate else trunk, "trunk": trunk}
    return [_site(kind, path, embedding, model, observation) for kind, path in paths.items()]


def _site(kind: Kind, path: str, like: Site, model: nn.Module, observation: Observation) -> Site:
    """Describe the module at ``path`` as a site with the width, dtype and device of ``like``.

    If ``like`` is the embedding, ``ids`` names the argument that holds the tensor it embeds.
    """
    call, module = observation.calls[path], model.get_submodule(path)
    plan = HostPlan(path, frozenset(), call.args, call.kwargs)
    named = named_arguments(type(module).forward, call.args, call.kwargs)
    return Site(
        path, kind, kind, like.width, dtype=like.dtype, device=like.device, host=plan,
        ids=_ids(path, like, model, observation), call=named,
        ports={"call": Port("call", like.width, None)},
    )  # fmt: skip


def _ids(path: str, embedding: Site, model: nn.Module, observation: Observation) -> str:
    """Return the argument of a module's call that holds the embedded tokens; "" if none does."""
    call, host = observation.calls[path], embedding.host
    if host is None or embedding.kind != "embedding":
        return ""
    forward = type(model.get_submodule(path)).forward
    tokens = [x for x in leaves((host.args, host.kwargs)) if is_integer_tensor(x)]
    named = named_arguments(forward, call.args, call.kwargs).items()
    found = (
        name
        for name, x in named
        if is_integer_tensor(x) and any(tensors_equal(x, t) for t in tokens)
    )
    return next(found, "")


def common_ancestor(paths: list[str]) -> str:
    """Return the longest module path that is, or lies above, every one of ``paths``."""
    split = [path.split(".") if path else [] for path in paths]
    shared: list[str] = []
    for names in zip(*split, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)
