"""Match the rows of an attention's query heads with the tokens of its output.

batch first, sequence first    rows (B, H, n) are the tokens (B, n) or (n, B), in order
replay                         the model rearranges the context, and so the rows (replay.py)
before a sum                   something is added to the context: it is edited before the sum
otherwise                      no lse, and ``missing`` says why
"""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.patterns.attention_output import SUMS
from surgery.patterns.dataflow import (
    PRODUCTS,
    flow,
    inputs,
    is_activation,
    op_name,
    upstream,
    value,
)
from surgery.patterns.layout import propagate_labels, split_rows, token_order
from surgery.patterns.match import Match, PortNode
from surgery.patterns.projection import features_last
from surgery.patterns.replay import Replay, replay_of
from surgery.patterns.streams import propagate_rows


def set_rows(found: Match) -> None:
    """Note in a match how the rows of the query heads belong to the tokens of the output.

    Sets ``sequence_first`` of the output and merged ports; or ``replay``, if the model itself
    rearranges the rows into the output's order; or ``missing["lse"]``, if neither is known.
    """
    ports, output = found.ports, found.ports["output"]
    proj = ports["query"].projection if "query" in ports else None
    heads = ports["query_unrotated"].node

    def split(x: Tensor) -> Tensor:
        if found.order is not None:
            return x.permute(found.order)
        return x if x.dim() != 3 or not found.heads else split_rows(x, found.heads)

    tokens = output.tokens
    if proj is None:
        rows = split(value(heads))
        width = found.heads * value(ports["context"].node).shape[-1]
        fits = rows.dim() == 4 and rows.shape[0] * rows.shape[2] == tokens.shape[:-1].numel()
        fits &= output.projection is not None or tokens.shape[-1] == width
        order = "batch first" if fits else ""
    else:
        order = token_order(proj, heads, split, tokens)
    merged = ports["merged"]
    output.sequence_first = merged.sequence_first = order == "sequence first"
    if _is_added_to(found):
        if _has_plain_heads(found):  # an edit of the merged heads stands before the sum
            ports["merged"] = PortNode(ports["context"].node, heads_first=True)
        else:
            found.missing["lse"] = "something is added to its context"
        return
    axes = output.projection.in_axes if output.projection else 1
    if merged.tokens.shape[:-axes].numel() != tokens.shape[:-1].numel() or not _keeps_rows(found):
        found.missing["lse"] = "its merged heads are not the tokens of its output, in order"
        return
    if not order and found.order is None and weights_come_first(found):
        context, query = ports["context"].node, ports["query_heads"].node
        found.replay = replay_of(context, query, merged.node, merged.channels_first)
    if found.replay is not None:
        _take_heads_of_replay(found, found.replay)
    elif not order:
        found.missing["lse"] = "its query heads are not (B, H, n, d) for the n tokens of its output"


def _take_heads_of_replay(found: Match, replay: Replay) -> None:
    """Note the numbers of heads that a replay shows, and the order of the merged features."""
    queries, keys = (value(found.ports[n].node).shape for n in ("query_heads", "key_heads"))
    found.heads = replay.heads
    found.ports["merged"].columns = replay.columns
    if len(keys) == len(queries):  # the heads' axis may be that of B H rows
        found.kv_heads = keys[replay.axis] * replay.heads // queries[replay.axis]


def _has_plain_heads(found: Match) -> bool:
    """Whether the context is (B, H, n, d), and its rows are the tokens of the merged heads."""
    context, merged = found.ports["context"], found.ports["merged"]
    shape = value(context.node).shape
    plain = found.order is None and not found.parts and weights_come_first(found)
    if not plain or len(shape) != 4 or shape != value(found.ports["query_heads"].node).shape:
        return False
    numbers = torch.arange(shape[0] * shape[2], dtype=torch.int32)
    rows = numbers.reshape(shape[0], 1, shape[2], 1).expand(shape)
    there = propagate_labels(context.node, rows, merged.node)
    if there is None or there.shape != value(merged.node).shape:
        return False
    tokens = features_last(there, merged.channels_first).reshape(-1, shape[1] * shape[3])
    return bool(tokens.shape[0] == len(numbers) and (tokens == numbers.unsqueeze(-1)).all())


def _is_added_to(found: Match) -> bool:
    """Whether something other than parts of the attention is added to its context."""
    chain = flow(found.ports["context"].node, found.ports["merged"].node)
    added = [n for node in chain if op_name(node) in SUMS for n in inputs(node)]
    return any(is_activation(n) and found.core not in upstream(n) for n in added)


def _keeps_rows(found: Match) -> bool:
    """Whether parts of the context that are concatenated again are in their order.

    A model may take streams apart and put them together the other way round.
    """
    context, merged = found.ports["context"].node, found.ports["merged"].node
    if found.parts or not any(op_name(n) == "cat" for n in flow(context, merged)):
        return True
    shape = value(context).shape
    numbers = torch.arange(shape[-2], dtype=torch.int32).unsqueeze(-1).expand(shape)
    rows = propagate_rows(context, numbers, merged)
    expected = torch.arange(shape[-2], dtype=torch.int32).unsqueeze(-1)
    if rows is None or rows.dim() < 2 or rows.shape[-2] != shape[-2]:
        return True  # the labels are lost in between
    return bool(((rows == expected) | (rows < 0)).all())  # below 0: features from elsewhere


def weights_come_first(found: Match) -> bool:
    """Whether the context is (weights) V, so that its rows are those of the query heads."""
    context = found.ports["context"].node
    if op_name(context) not in PRODUCTS or "weights" not in found.ports:
        return True
    return (
        next(n for n in context.all_input_nodes if is_activation(n)) is found.ports["weights"].node
    )
