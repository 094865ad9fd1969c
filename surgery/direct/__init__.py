"""Edit and read the ports of a model directly, without a plugin."""

from surgery.direct.ready_made import ablate, transplant
from surgery.direct.seen_values import Seen
from surgery.direct.verbs import insert, read, replace
from surgery.direct.watching import watch

__all__ = ["Seen", "ablate", "insert", "read", "replace", "transplant", "watch"]
