"""Recognise attention, FFN and projections by the dataflow of a captured graph."""

from surgery.patterns.block import match_block
from surgery.patterns.dataflow import (
    PRODUCTS,
    inputs,
    is_row_maximum,
    op_name,
    origin,
    rows_sum_to_one,
    value,
)
from surgery.patterns.experts import (
    expert_lists,
    innermost,
    place,
    runs_experts,
    stays_whole,
)
from surgery.patterns.ffn import joins_residual
from surgery.patterns.find import find_matches, linear_matches, module_match, projections
from surgery.patterns.layout import split_rows
from surgery.patterns.match import Match, PortNode, uses_of, weights_in
from surgery.patterns.projection import (
    Projection,
    every_position,
    input_of_call,
    is_whole,
    module_call_of,
    packs_weights,
    stacks_weights,
)
from surgery.patterns.projection_weights import bias_of, weight_of
from surgery.patterns.scores import added_to_scores, causal, slopes, stretch
from surgery.patterns.stacked_weights import StackedMap, stacked_maps

__all__ = [
    "PRODUCTS",
    "Match",
    "PortNode",
    "Projection",
    "StackedMap",
    "added_to_scores",
    "bias_of",
    "causal",
    "every_position",
    "expert_lists",
    "find_matches",
    "innermost",
    "input_of_call",
    "inputs",
    "is_row_maximum",
    "is_whole",
    "joins_residual",
    "linear_matches",
    "match_block",
    "module_call_of",
    "module_match",
    "op_name",
    "origin",
    "packs_weights",
    "place",
    "projections",
    "rows_sum_to_one",
    "runs_experts",
    "slopes",
    "split_rows",
    "stacked_maps",
    "stacks_weights",
    "stays_whole",
    "stretch",
    "uses_of",
    "value",
    "weight_of",
    "weights_in",
]
