"""Apply the edits of methods to the nodes of a captured graph."""

from surgery.rewrite.apply import apply_edit, port_values, require_applied
from surgery.rewrite.lse import first_of, second_of

__all__ = ["apply_edit", "first_of", "port_values", "require_applied", "second_of"]
