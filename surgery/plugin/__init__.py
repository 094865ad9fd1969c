"""Offer what methods and tasks are written with: sites, ports, base classes, hooks."""

from surgery.plugin.base_classes import Method, Start
from surgery.plugin.dropout import Dropout, draw_by_name, settle_advance
from surgery.plugin.edit import CALLS, TOLD, Edit, HostPlan, Kind
from surgery.plugin.forwards import adds_onto, starts_with_product
from surgery.plugin.found_attention import FoundAttention
from surgery.plugin.frozen_parts import (
    DistanceScores,
    Reference,
    as_matrix,
    frozen_inside,
    referred,
)
from surgery.plugin.hookspecs import Register, RegisterTask, hookimpl
from surgery.plugin.installed_plugins import installed
from surgery.plugin.lookup import (
    find_sites,
    is_leaf,
    method,
    methods,
    plugin_problems,
    register,
    task,
    tasks,
)
from surgery.plugin.module_protocols import (
    ActsOnTokens,
    AddsOnto,
    CountsVirtualKeys,
    Divisible,
    Factored,
    Foldable,
    FoldableInput,
    LeadsCache,
    NamesFast,
    NamesRates,
    NamesUndecayed,
    NeedsBias,
    PartlyFoldable,
    Reparametrised,
    RunsGrouped,
    StartsWithProduct,
)
from surgery.plugin.notebook import html_table
from surgery.plugin.open_site import OpenPort, OpenSite, opened
from surgery.plugin.quick_patterns import are_quick_patterns
from surgery.plugin.selection import Sites, overlooked_lines
from surgery.plugin.site import Port, Site
from surgery.plugin.task_class import Example, Features, Task, TaskKind
from surgery.plugin.training_hooks import bound, overridden

__all__ = [
    "CALLS",
    "TOLD",
    "ActsOnTokens",
    "AddsOnto",
    "CountsVirtualKeys",
    "DistanceScores",
    "Divisible",
    "Dropout",
    "Edit",
    "Example",
    "Factored",
    "Features",
    "Foldable",
    "FoldableInput",
    "FoundAttention",
    "HostPlan",
    "Kind",
    "LeadsCache",
    "Method",
    "NamesFast",
    "NamesRates",
    "NamesUndecayed",
    "NeedsBias",
    "OpenPort",
    "OpenSite",
    "PartlyFoldable",
    "Port",
    "Reference",
    "Register",
    "RegisterTask",
    "Reparametrised",
    "RunsGrouped",
    "Site",
    "Sites",
    "Start",
    "StartsWithProduct",
    "Task",
    "TaskKind",
    "adds_onto",
    "are_quick_patterns",
    "as_matrix",
    "bound",
    "draw_by_name",
    "find_sites",
    "frozen_inside",
    "hookimpl",
    "html_table",
    "installed",
    "is_leaf",
    "method",
    "methods",
    "opened",
    "overlooked_lines",
    "overridden",
    "plugin_problems",
    "referred",
    "register",
    "settle_advance",
    "starts_with_product",
    "task",
    "tasks",
]
