"""Apply the edits of methods to the nodes of a captured graph."""

from surgery.rewrite.apply import apply_edit, port_values, require_applied
from surgery.rewrite.casts import dtype_reads
from surgery.rewrite.grouped import Picks
from surgery.rewrite.leading import forget_leading, lead_caches, leading_epoch
from surgery.rewrite.lse import lse_of, output_of
from surgery.rewrite.partly import Partly
from surgery.rewrite.products import add_product
from surgery.rewrite.rows import Rows
from surgery.rewrite.shared_products import share_products

__all__ = [
    "Partly",
    "Picks",
    "Rows",
    "add_product",
    "apply_edit",
    "dtype_reads",
    "forget_leading",
    "lead_caches",
    "leading_epoch",
    "lse_of",
    "output_of",
    "port_values",
    "require_applied",
    "share_products",
]
