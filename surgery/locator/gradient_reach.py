"""Tell which sites a loss on the model's output can train, from the dataflow of one run.

A method at any other site would get no gradient, in silence:

    under no_grad      the model runs the module without gradients, as some do with a frozen tower
    thrown away        the model's output does not depend on the site's: it reads an earlier layer
    detached           it depends on it only by way of ``detach``
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from surgery.locator.run_record import Observation
from surgery.patterns import Match


def why_untrained(observation: Observation) -> Callable[[Match, str], str]:
    """Return a function of a match and its host: why no gradient reaches it; "" if one does."""
    used = _used(observation)

    def why(match: Match, host: str) -> str:
        owners = {str(node.meta["owner"]) for node in match.nodes} | {host}
        if owners & observation.without_gradient:
            return "the model runs it under no_grad"
        if used and match.ports["output"].node not in used:
            return "the output of the model does not depend on it"
        return ""

    return why


def _used(observation: Observation) -> set[fx.Node]:
    """Return the nodes that the model's output depends on, with a gradient."""
    used = set(observation.outputs)
    for node in reversed(list(observation.graph.nodes)):
        writes = node.op == "call_function" and _name(node) in ("__setitem__", "setitem")
        if writes and node.args and node.args[0] in used:
            used.add(node)
        if node in used and _name(node) != "detach":
            used.update(node.all_input_nodes)
            used.update(node.meta.get("inside", ()))  # of a mixture of experts
    return used


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))
