"""Insert methods into a model, verify them, switch them off and take them out."""

from surgery.splicer.operations import disabled, forget, remove, require_spliced, splice, variants
from surgery.splicer.record import ROWS, Inserted, Report, forget_rows, records

__all__ = [
    "ROWS",
    "Inserted",
    "Report",
    "disabled",
    "forget",
    "forget_rows",
    "records",
    "remove",
    "require_spliced",
    "splice",
    "variants",
]
