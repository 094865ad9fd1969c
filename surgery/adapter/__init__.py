"""Train, count, save, load and merge what was spliced into a model."""

from surgery.adapter.combining import combine
from surgery.adapter.counts import Summary, summary
from surgery.adapter.fitting import fit
from surgery.adapter.hot_swap import hotswap
from surgery.adapter.inspection import SavedAdapter, inspect
from surgery.adapter.loading import load, restore
from surgery.adapter.loralib_loading import load_loralib
from surgery.adapter.merging import Merged, merge, unmerge
from surgery.adapter.one_liners import inducer, lora, prefix
from surgery.adapter.optimizer_groups import parameter_groups
from surgery.adapter.parameters import spliced_parameters
from surgery.adapter.peft_conversion import from_peft
from surgery.adapter.pushing import push
from surgery.adapter.row_training import train_rows, trained_rows
from surgery.adapter.saving import save
from surgery.adapter.training import Frozen, freeze_base
from surgery.adapter.training_run import LifeCycle, life_cycle

__all__ = [
    "Frozen",
    "LifeCycle",
    "Merged",
    "SavedAdapter",
    "Summary",
    "combine",
    "fit",
    "freeze_base",
    "from_peft",
    "hotswap",
    "inducer",
    "inspect",
    "life_cycle",
    "load",
    "load_loralib",
    "lora",
    "merge",
    "parameter_groups",
    "prefix",
    "push",
    "restore",
    "save",
    "spliced_parameters",
    "summary",
    "train_rows",
    "trained_rows",
    "unmerge",
]
