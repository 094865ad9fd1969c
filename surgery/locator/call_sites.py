"""Find the sites with the port ``call``: a whole module call, to be wrapped (``Port.wrap``).

trunk    the smallest module that contains the embedding and every attention, and is called with
         token ids: around a language model that is called with embeddings, the module that embeds;
         an encoder and a decoder that embed tokens have one each
stack    the trunk's child that contains every attention but not the embedding; the trunk itself
         if no such child is called
block    the smallest module that contains one FFN and at least one attention; it has the ports
         input and output, too, the hidden states
"""

from __future__ import annotations

import dataclasses
from collections import Counter

from torch import Tensor, fx, nn

from surgery.interop import is_integer_tensor, leaves, named_arguments, tensors_equal
from surgery.locator.block_output import ports_of_block
from surgery.locator.run_record import Observation
from surgery.plugin import HostPlan, Kind, Port, Site


def call_sites(
    model: nn.Module, observation: Observation, sites: list[Site], others: list[Site]
) -> list[Site]:
    """Return the blocks of a model, and the stack and trunk of each module that embeds tokens.

    Args:
        sites: the attention and FFN sites.
        others: the sites of :func:`module_sites`, the embedding among them.
    """
    blocks = [_block(path, model, observation, sites) for path in _blocks(observation, sites)]
    return blocks + _stacks_and_trunks(model, observation, sites, others)


def _blocks(observation: Observation, sites: list[Site]) -> list[str]:
    """Return the paths of the smallest modules that contain one FFN and at least one attention."""
    attention = {p for s in sites if s.kind == "attention" for p in with_ancestors(s.path)}
    ffns = dict.fromkeys(site.path for site in sites if site.kind == "ffn")
    count = Counter(path for ffn in ffns for path in with_ancestors(ffn))
    found: dict[str, None] = {}
    for ffn in ffns:
        callers = (p for p in with_ancestors(ffn) if p in observation.calls and p in attention)
        path = next(callers, "")
        if path and count[path] == 1:
            found[path] = None
    return list(found)


def _block(path: str, model: nn.Module, observation: Observation, sites: list[Site]) -> Site:
    """Describe a block; it may be the host of its FFN, too, and is then traced through alike."""
    made = _site("block", path, sites[0], model, observation)
    through = [s.host.through for s in sites if s.path == path and s.host is not None]
    assert made.host is not None
    host = dataclasses.replace(made.host, through=made.host.through.union(*through))
    ports = {**ports_of_block(path, observation, model), **made.ports}
    width = ports["output"].width if "output" in ports else made.width
    missing = {} if "output" in ports else {"output": "the block gives no hidden states first"}
    return dataclasses.replace(made, host=host, ports=ports, missing=missing, width=width)


def with_ancestors(path: str) -> list[str]:
    """Return the path of a module, and those of the modules that contain it, up to the root."""
    found = [path]
    while path:
        path = path.rpartition(".")[0]
        found.append(path)
    return found


def _inside(path: str, others: set[str]) -> set[str]:
    """Return the paths among ``others`` that are ``path`` or lie below it."""
    return {other for other in others if not path or f"{other}.".startswith(f"{path}.")}


def positions_of_tokens(others: list[Site], sites: list[Site]) -> list[Site]:
    """Return ``others`` without positions that are not those of embedded tokens.

    The positions of tokens are encoded in the smallest module that contains an embedding of tokens
    and an attention. Others are those of patches, in a tower for images.
    """
    attention = [site for site in sites if site.kind == "attention"]
    towers = [_tower(site.path, attention) for site in others if site.kind == "embedding"]
    return [
        site
        for site in others
        if site.kind != "position" or not towers or any(_inside(t, {site.path}) for t in towers)
    ]


def _stacks_and_trunks(
    model: nn.Module, observation: Observation, sites: list[Site], others: list[Site]
) -> list[Site]:
    """Return the stack and the trunk of each module that embeds tokens at one place.

    A method can put tokens in front of a sequence at the trunk's call, and take them out of the
    hidden states at the stack's. Where several modules embed tokens, as an encoder and a decoder
    do, each has its own. A module that embeds tokens at several places has none.
    """
    embeddings = [site for site in others if site.kind == "embedding"]
    attention = [site for site in sites if site.kind == "attention"]
    if not embeddings or not attention:
        return []
    towers = [_tower(site.path, attention) for site in embeddings]
    crossed = [_crosses(path, attention) for path in towers]
    if len(embeddings) == 1:  # of several, an encoder's would reach the decoder's attention
        attention = _after(embeddings[0], attention, observation) or attention
        towers = [common_ancestor([towers[0], *(site.path for site in attention)])]
    trunks = [
        _with_ids(path, embedding, model, observation)
        for path, embedding in zip(towers, embeddings, strict=True)
    ]
    found: list[Site] = []
    for trunk, embedding, crosses in zip(trunks, embeddings, crossed, strict=True):
        if len([each for each in trunks if _inside(trunk, {each})]) > 1:
            continue
        below = [site.path for site in attention if _inside(trunk, {site.path})]
        stack = _stack(trunk, embedding.path, below, observation)
        role = "decoder" if crosses else "encoder" if sum(crossed) == 1 else ""
        paths: dict[Kind, str] = {"stack": stack, "trunk": trunk}
        for kind, path in paths.items():
            site = _site(kind, path, embedding, model, observation)
            found.append(dataclasses.replace(site, role=role))
    return [_with_memory(site, found) for site in found]


def _with_memory(site: Site, sites: list[Site]) -> Site:
    """Return a decoder's trunk with the arguments that belong to the sequence it attends to."""
    if site.kind != "trunk" or site.role != "decoder":
        return site
    others = [other for other in sites if other.path != site.path]
    theirs = {id(x) for other in others for x in other.call.values() if isinstance(x, Tensor)}
    given = {name: x for name, x in site.call.items() if isinstance(x, Tensor)}
    hidden = [name for name, x in given.items() if x.dim() == 3 and x.is_floating_point()]
    shared = [name for name, x in given.items() if id(x) in theirs and name not in hidden]
    return dataclasses.replace(site, memory=(*hidden, *shared))


def _tower(embedding: str, attention: list[Site]) -> str:
    """Return the smallest module that contains an embedding and an attention."""
    paths, path = {site.path for site in attention}, embedding
    while path and not _inside(path, paths):
        path = path.rpartition(".")[0]
    return path


def _after(embedding: Site, attention: list[Site], observation: Observation) -> list[Site]:
    """Return the attention that depends on what an embedding gives."""
    reached: set[fx.Node] = set()
    modules: set[str] = set()
    for node in observation.graph.nodes:
        if node.op == "call_module" and node.target == embedding.path:
            reached.add(node)
        elif not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
            modules |= {node.meta["owner"], str(node.target)}
    return [site for site in attention if _inside(site.path, modules)]


def _crosses(path: str, attention: list[Site]) -> bool:
    """Whether queries in this module attend to another sequence."""
    return any(site.cross and _inside(path, {site.path}) for site in attention)


def _called(path: str, observation: Observation) -> str:
    """Return the nearest module, from ``path`` upwards, that the model calls."""
    while path not in observation.calls:
        path = path.rpartition(".")[0]
    return path


def _with_ids(path: str, embedding: Site, model: nn.Module, observation: Observation) -> str:
    """Return the nearest module, from ``path`` upwards, that is called with the token ids."""
    path = _called(path, observation)
    while path and not _ids(path, embedding, model, observation):  # it is called with embeddings
        path = _called(path.rpartition(".")[0], observation)
    return path


def _stack(trunk: str, embedding: str, attention: list[str], observation: Observation) -> str:
    """Return the child of a trunk that contains every attention but not the embedding.

    If there is none it is the trunk itself. Then the wrap of the stack must be inside that of the
    trunk: the sequence is cut before the trunk's wrap returns. The first wrap of a module is the
    innermost.
    """
    below = common_ancestor(attention).removeprefix(trunk).removeprefix(".").split(".")[0]
    stack = f"{trunk}.{below}" if trunk else below
    separate = below and stack in observation.calls and not embedding.startswith(f"{stack}.")
    return stack if separate else trunk


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
