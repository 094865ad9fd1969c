"""Model surgery: parameter-efficient methods spliced into any transformer, in place.

import surgery
sites = surgery.locate(model)
surgery.splice(model, surgery.method("lora", rank=8), at=sites.attention)
surgery.freeze_base(model)
...                                     # train and generate as before
surgery.save(model, "adapter/")
surgery.remove(model)                   # bit for bit the model that it was
"""

from surgery.dropout import Dropout
from surgery.errors import (
    CaptureError,
    MethodError,
    PortError,
    RecipeError,
    SiteError,
    SpliceError,
    StoreError,
    SurgeryError,
    suggest,
)
from surgery.frozen import Reference
from surgery.hookspecs import Register, RegisterTask, hookimpl
from surgery.huggingface import without_checkpointing
from surgery.locate import locate
from surgery.merge import merge
from surgery.merged import Merged
from surgery.method import Method, Start
from surgery.registry import method, methods, task, tasks
from surgery.rows import train_rows
from surgery.selection import Sites
from surgery.sites import Port, Site
from surgery.splice import disabled, remove, splice, variants
from surgery.store import load, save
from surgery.task import Task
from surgery.train import freeze_base, spliced_parameters, summary
from surgery.virtual import virtual_lse, virtual_tokens

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "Dropout",
    "Merged",
    "Method",
    "MethodError",
    "Port",
    "PortError",
    "RecipeError",
    "Reference",
    "Register",
    "RegisterTask",
    "Site",
    "SiteError",
    "Sites",
    "SpliceError",
    "Start",
    "StoreError",
    "SurgeryError",
    "Task",
    "disabled",
    "freeze_base",
    "hookimpl",
    "load",
    "locate",
    "merge",
    "method",
    "methods",
    "remove",
    "save",
    "splice",
    "spliced_parameters",
    "suggest",
    "summary",
    "task",
    "tasks",
    "train_rows",
    "variants",
    "virtual_lse",
    "virtual_tokens",
    "without_checkpointing",
]
