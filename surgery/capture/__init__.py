"""Turn one forward of one module into a ``torch.fx`` graph."""

from surgery.capture.branches import Branch, is_pure, reads_opaque
from surgery.capture.captured import Captured
from surgery.capture.forward import capture
from surgery.capture.module_hooks import run_always_called_hooks, run_forward_hooks, run_pre_hooks
from surgery.capture.proxy import IN_PLACE
from surgery.capture.reads import MISSING, Read, TensorKind, contents, same
from surgery.capture.records import make_record

__all__ = [
    "IN_PLACE",
    "MISSING",
    "Branch",
    "Captured",
    "Read",
    "TensorKind",
    "capture",
    "contents",
    "is_pure",
    "make_record",
    "reads_opaque",
    "run_always_called_hooks",
    "run_forward_hooks",
    "run_pre_hooks",
    "same",
]
