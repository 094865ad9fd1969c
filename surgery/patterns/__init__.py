"""Recognise attention, FFN and projections by the dataflow of a captured graph."""

from surgery.patterns.dataflow import (
    PRODUCTS,
    inputs,
    is_row_maximum,
    op_name,
    origin,
    rows_sum_to_one,
    value,
)
from surgery.patterns.ffn import joins_residual
from surgery.patterns.find import find_matches, linear_matches, module_match, projections
from surgery.patterns.layout import split_rows
from surgery.patterns.match import Match, PortNode, weights_in
from surgery.patterns.projection import (
    Projection,
    every_position,
    input_of_call,
    module_call_of,
    stacks_weights,
)
from surgery.patterns.projection_weights import bias_of, weight_of
from surgery.patterns.scores import causal, stretch

__all__ = [
    "PRODUCTS",
    "Match",
    "PortNode",
    "Projection",
    "bias_of",
    "causal",
    "every_position",
    "find_matches",
    "input_of_call",
    "inputs",
    "is_row_maximum",
    "joins_residual",
    "linear_matches",
    "module_call_of",
    "module_match",
    "op_name",
    "origin",
    "projections",
    "rows_sum_to_one",
    "split_rows",
    "stacks_weights",
    "stretch",
    "value",
    "weight_of",
    "weights_in",
]
