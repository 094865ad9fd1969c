"""Model surgery: parameter-efficient methods spliced into any transformer, in place.

import surgery
sites = surgery.locate(model)
surgery.splice(model, surgery.method("lora", rank=8), at=sites.attention)
surgery.freeze_base(model)
...                                     # train and generate as before
surgery.save(model, "adapter/")
surgery.remove(model)                   # bit for bit the model that it was
"""

from importlib.metadata import version as _version

from surgery.adapter import (
    Frozen,
    Merged,
    Summary,
    freeze_base,
    load,
    merge,
    restore,
    save,
    spliced_parameters,
    summary,
    train_rows,
    trained_rows,
)
from surgery.attention import virtual_lse, virtual_tokens
from surgery.errors import (
    CaptureError,
    ForwardError,
    MethodError,
    PortError,
    RecipeError,
    RefusedError,
    SiteError,
    SpliceError,
    StoreError,
    SurgeryError,
    suggest,
)
from surgery.host import Variant
from surgery.interop import CallValue, in_backward, without_checkpointing
from surgery.locator import locate
from surgery.plugin import (
    AddsOnto,
    CountsVirtualKeys,
    Dropout,
    Example,
    Features,
    Foldable,
    FoldableInput,
    Method,
    NamesUndecayed,
    NeedsBias,
    OpenPort,
    OpenSite,
    PartlyFoldable,
    Port,
    Reference,
    Register,
    RegisterTask,
    Reparametrised,
    Site,
    Sites,
    Start,
    Task,
    TaskKind,
    hookimpl,
    method,
    methods,
    task,
    tasks,
)
from surgery.splicer import Inserted, Report, disabled, refresh, remove, splice, variants

__version__ = _version("surgery")

__all__ = [
    "AddsOnto",
    "CallValue",
    "CaptureError",
    "CountsVirtualKeys",
    "Dropout",
    "Example",
    "Features",
    "Foldable",
    "FoldableInput",
    "ForwardError",
    "Frozen",
    "Inserted",
    "Merged",
    "Method",
    "MethodError",
    "NamesUndecayed",
    "NeedsBias",
    "OpenPort",
    "OpenSite",
    "PartlyFoldable",
    "Port",
    "PortError",
    "RecipeError",
    "Reference",
    "RefusedError",
    "Register",
    "RegisterTask",
    "Reparametrised",
    "Report",
    "Site",
    "SiteError",
    "Sites",
    "SpliceError",
    "Start",
    "StoreError",
    "Summary",
    "SurgeryError",
    "Task",
    "TaskKind",
    "Variant",
    "disabled",
    "freeze_base",
    "hookimpl",
    "in_backward",
    "load",
    "locate",
    "merge",
    "method",
    "methods",
    "refresh",
    "remove",
    "restore",
    "save",
    "splice",
    "spliced_parameters",
    "suggest",
    "summary",
    "task",
    "tasks",
    "train_rows",
    "trained_rows",
    "variants",
    "virtual_lse",
    "virtual_tokens",
    "without_checkpointing",
]
