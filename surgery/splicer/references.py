"""Make the reference of preference training: the model as it is now, frozen.

only active splices are trained    a view of the same model with frozen copies of them: the
                                   memory of an adapter
more of the model is trained       a frozen deep copy of the model, as without an adapter
"""

from __future__ import annotations

import copy as copying

from torch import nn

from surgery.interop import preference_trainers
from surgery.splicer.activation import in_use
from surgery.splicer.naming import copy
from surgery.splicer.record import RECORD, reports, unused_name
from surgery.splicer.views import view

NAME = "reference"


def give_references() -> None:
    """Give references to TRL's trainers from now on."""
    preference_trainers.give_references(_reference)


def _reference(model: nn.Module, written: bool) -> nn.Module | None:
    """Return the model as it is now, frozen; None if nothing is spliced into it.

    Args:
        written: whether the trainer writes to the parameters of the reference.
    """
    if RECORD not in vars(model):
        return None
    on = {name: share for name, share in in_use(model).items() if share}
    trained = {name: _trained(model, name) for name in on}
    inserted = {id(p) for found in trained.values() for p in found}
    if written or any(p.requires_grad and id(p) not in inserted for p in model.parameters()):
        return copying.deepcopy(model).requires_grad_(False)
    return view(model, {_copied(model, n) if trained[n] else n: on[n] for n in on})


def _trained(model: nn.Module, name: str) -> list[nn.Parameter]:
    modules = [model.get_submodule(i.path) for i in reports(model)[name].inserted]
    return [p for m in modules for p in m.parameters() if p.requires_grad]


def _copied(model: nn.Module, name: str) -> str:
    """Copy a splice under the first free name; return the name."""
    new = unused_name(model, NAME if name == "default" else f"{NAME}_{name}")
    copy(model, name, new)
    return new
