"""Apply the edits of methods to the nodes of a captured graph."""

from surgery.rewrite.apply import apply_edit, port_values, require_applied
from surgery.rewrite.casts import dtype_reads
from surgery.rewrite.grouped import Picks
from surgery.rewrite.lse import lse_of, output_of
from surgery.rewrite.partly import Partly
from surgery.rewrite.rows import Rows

__all__ = [
    "Partly",
    "Picks",
    "Rows",
    "apply_edit",
    "dtype_reads",
    "lse_of",
    "output_of",
    "port_values",
    "require_applied",
]
