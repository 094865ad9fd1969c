"""Train, count, save, load and merge what was spliced into a model."""

from surgery.adapter.counts import Summary, summary
from surgery.adapter.loading import load, restore
from surgery.adapter.merging import Merged, merge
from surgery.adapter.parameters import spliced_parameters
from surgery.adapter.row_training import train_rows, trained_rows
from surgery.adapter.saving import save
from surgery.adapter.training import Frozen, freeze_base

__all__ = [
    "Frozen",
    "Merged",
    "Summary",
    "freeze_base",
    "load",
    "merge",
    "restore",
    "save",
    "spliced_parameters",
    "summary",
    "train_rows",
    "trained_rows",
]
