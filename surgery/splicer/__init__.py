"""Insert methods into a model, verify them, switch them off and take them out."""

from surgery.splicer.activation import (
    disabled,
    in_use,
    put_in_use,
    require_spliced,
    route,
    use,
    using,
)
from surgery.splicer.all_or_nothing import Before, atomically
from surgery.splicer.naming import add_beside, copies, copy, rename
from surgery.splicer.operations import (
    forget,
    refresh,
    remove,
    splice,
    variants,
)
from surgery.splicer.record import (
    Inserted,
    Report,
    forget_rows,
    is_name,
    look_up,
    record_of,
    reports,
    require_free,
    spliced_model,
    unused_name,
)
from surgery.splicer.rehearsal import rehearse
from surgery.splicer.reinsertion import Spliced
from surgery.splicer.views import view

__all__ = [
    "Before",
    "Inserted",
    "Report",
    "Spliced",
    "add_beside",
    "atomically",
    "copies",
    "copy",
    "disabled",
    "forget",
    "forget_rows",
    "in_use",
    "is_name",
    "look_up",
    "put_in_use",
    "record_of",
    "refresh",
    "rehearse",
    "remove",
    "rename",
    "reports",
    "require_free",
    "require_spliced",
    "route",
    "splice",
    "spliced_model",
    "unused_name",
    "use",
    "using",
    "variants",
    "view",
]
