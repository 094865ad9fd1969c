"""Make the reference of preference training: the model as it is now, frozen.

It is a copy that shares with the model all that nobody trains, so it takes the memory of an
adapter. It has modules, splices and graphs of its own: what is trained, switched or removed in the
model later leaves it as it is, and its evaluation mode is its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import Tensor, nn

from surgery.host import hosts
from surgery.interop import outside_inference_mode, preference_trainers
from surgery.splicer.record import reports, spliced_model


def give_references() -> None:
    """Give references to TRL's trainers from now on."""
    preference_trainers.give_references(_reference)


@outside_inference_mode
def _reference(model: nn.Module, written: bool) -> nn.Module | None:
    """Return the model as it is now, frozen; None if nothing is spliced into it.

    Args:
        written: whether the trainer writes to the parameters of the reference. It shares none then.
    """
    whole = spliced_model(model)
    if not hosts(whole):
        return None
    shared = {} if written else {id(tensor): tensor for tensor in _untrained(whole)}
    made = copy.deepcopy(whole, dict(shared))
    for parameter in made.parameters():
        if id(parameter) not in shared:
            parameter.requires_grad_(False)
    return made


def _untrained(model: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors of the base that training leaves as they are."""
    paths = [i.path for report in reports(model).values() for i in report.inserted]
    inserted = {id(m) for path in paths for m in model.get_submodule(path).modules()}
    for module in model.modules():
        if id(module) not in inserted:
            yield from (p for p in module.parameters(recurse=False) if not p.requires_grad)
            if getattr(module, "running_mean", None) is None:  # statistics, written in training
                yield from module.buffers(recurse=False)
