"""Keep parameters out of the weight decay of transformers' ``Trainer``.

``Trainer`` chooses what decays by layer types and names, in ``get_decay_parameter_names``. What it
returns for a model is filtered here. Subclasses that override it decide for themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from types import ModuleType
from typing import Any

from torch import nn

from surgery.interop.imports import on_import

Spared = Callable[[nn.Module], Collection[nn.Parameter]]


def spare_from_decay(spared: Spared) -> None:
    """Let no ``Trainer`` decay the parameters of a model that ``spared`` returns for it."""
    on_import("transformers.trainer", functools.partial(_filter, spared))


def _filter(spared: Spared, module: ModuleType) -> None:
    trainer: Any = vars(module).get("Trainer")
    own = getattr(trainer, "get_decay_parameter_names", None)
    if own is None:
        return

    @functools.wraps(own)
    def get_decay_parameter_names(self: Any, model: nn.Module) -> list[str]:
        found: list[str] = own(self, model)
        out = {id(parameter) for parameter in spared(model)}
        by_name = dict(model.named_parameters())
        return [name for name in found if name not in by_name or id(by_name[name]) not in out]

    trainer.get_decay_parameter_names = get_decay_parameter_names
