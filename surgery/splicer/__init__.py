"""Insert methods into a model, verify them, switch them off and take them out."""

from surgery.splicer.operations import (
    disabled,
    forget,
    refresh,
    remove,
    require_spliced,
    splice,
    variants,
)
from surgery.splicer.record import Inserted, Report, forget_rows, look_up, record_of, reports

__all__ = [
    "Inserted",
    "Report",
    "disabled",
    "forget",
    "forget_rows",
    "look_up",
    "record_of",
    "refresh",
    "remove",
    "reports",
    "require_spliced",
    "splice",
    "variants",
]
