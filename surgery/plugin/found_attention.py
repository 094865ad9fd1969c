"""An attention that a plugin points out in a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from surgery.errors import SiteError, shown


@dataclass(frozen=True)
class FoundAttention:
    """The nodes of an attention that the library does not recognise; see the ``find_sites`` hook.

    What stands before and behind them, the projections, the merged heads and the output, is found
    as for any attention.

    Attributes:
        core: the node in which queries, keys and values meet: the call of a kernel, say. The site
            is in the module that runs it.
        query: the query heads (B, H, n, d).
        key, value: the key and value heads (B, G, m, d).
        context: the heads mixed, as the model has them; often the core itself.
        scale: the factor of the scores; None if there is no such thing.

    Example:
        ``surgery.FoundAttention(core=node, query=node, key=node, value=node, context=node)``
    """

    core: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    context: fx.Node
    scale: float | None = None


def checked(answer: Any, graph: fx.Graph) -> list[FoundAttention]:
    """Return what a ``find_sites`` hook has returned.

    Raises:
        SiteError: it is something else, or has nodes of another graph.
    """
    if not isinstance(answer, list) or not all(isinstance(x, FoundAttention) for x in answer):
        raise SiteError(
            f"a find_sites hook returned {shown(answer)}. It must return a list of "
            "surgery.FoundAttention, or None."
        )
    for each in answer:
        for part in ("core", "query", "key", "value", "context"):
            node = getattr(each, part)
            if not isinstance(node, fx.Node) or node.graph is not graph:
                raise SiteError(
                    f"a find_sites hook returned a FoundAttention with {part}={shown(node)}. It "
                    "must be a node of the graph that the hook was given."
                )
    return answer
