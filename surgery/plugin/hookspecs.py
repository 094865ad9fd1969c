"""The hooks that a plugin may implement, and the two markers that declare them.

A plugin is a module (or object) listed under the entry-point group ``surgery`` whose functions
carry ``@surgery.hookimpl``. Any plugin may implement any of these hooks.
"""

from __future__ import annotations

from collections.abc import Callable

import pluggy
from torch import fx, nn

from surgery.plugin.base_classes import Method
from surgery.plugin.found_attention import FoundAttention
from surgery.plugin.task_class import Task

Register = Callable[[type[Method]], None]


RegisterTask = Callable[[type[Task]], None]


hookspec = pluggy.HookspecMarker("surgery")


hookimpl = pluggy.HookimplMarker("surgery")


@hookspec
def register_methods(register: Register) -> None:
    """Offer methods: call ``register(MyMethod)`` once per class.

    :param register: takes a frozen dataclass that derives from :class:`surgery.Method`.
        Its ``name`` must be unique; a clash is an error that names both plugins.
    """


@hookspec
def register_tasks(register: RegisterTask) -> None:
    """Offer tasks for recipes: call ``register(MyTask)`` once per class.

    :param register: takes a frozen dataclass that derives from :class:`surgery.Task`.
        Its ``name`` must be unique; a clash is an error that names both plugins.
    """


@hookspec(firstresult=True)
def is_leaf(module: nn.Module, path: str) -> bool | None:
    """Say whether capture keeps ``module`` whole. pluggy stops at the first result but None.

    A module with children that holds whole numbers, as packed weights are, is a projection if it is
    kept whole. Layers without children need no hook.

    :param module: a submodule of a host, or of the model while its sites are looked for.
    :param path: its path below that one.
    :return: True to keep it whole, None for no opinion (for quantised or custom projections).
    """


@hookspec
def find_sites(graph: fx.Graph, root: nn.Module) -> list[FoundAttention] | None:
    """Point out attentions that have no softmax over scores, or hide it in an operator.

    They become sites with every port but ``lse``, ``weights`` and ``mask``, so methods that need
    none of these, such as LoRA, can be spliced in. What is recognised anyway is left as it is.

    :param graph: the graph of a whole model while its sites are looked for, and later that of each
        host. Nodes have an example value in ``meta["value"]``. Read it, and change nothing.
    :param root: the module that targets of the nodes refer to.
    :return: one :class:`surgery.FoundAttention` for each; None or an empty list for none.
    """
