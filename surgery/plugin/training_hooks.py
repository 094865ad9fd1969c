"""What a method may do while a model trains: the part of ``surgery.Method`` that is about time.

    surgery.fit             fit(model, batches)                    before training, from data
    training begins         on_train_start(model, total_steps)     each time, a resumed one too
    a loss                  extra_loss()                           added to the model's
    the optimizer stepped   on_step(step)                          gradients are still there

``Trainer`` calls them for a model whose base ``surgery.freeze_base`` froze, and
``surgery.life_cycle`` in a loop of one's own. What must outlive a copy, a pickle or a checkpoint
belongs into buffers of the inserted modules: the method itself is its options and no more.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from surgery.errors import MethodError

M = TypeVar("M", bound="TrainingHooks")


class TrainingHooks:
    """Hooks of a method; each does nothing until a subclass overrides it.

    The library calls them on a copy of the method for which :attr:`inserted` is set.
    """

    _inserted: ClassVar[tuple[nn.Module, ...] | None] = None

    @property
    def inserted(self) -> tuple[nn.Module, ...]:
        """The modules of this method in the model that trains, in the order of their insertion.

        Raises:
            MethodError: asked for outside these hooks: a method is no part of one model.
        """
        if self._inserted is None:
            raise MethodError(
                f"{type(self).__name__}.inserted is there in fit, on_train_start, on_step and "
                "extra_loss alone, when the library calls them."
            )
        return self._inserted

    def fit(self, model: nn.Module, batches: Iterable[Any]) -> None:
        """Initialise the inserted modules from data (EVA, steering vectors). See ``surgery.fit``.

        Args:
            model: the spliced model, in evaluation mode; gradients are off unless switched on here.
            batches: what ``model(**batch)`` takes, each a dictionary.
        """

    def on_train_start(self, model: nn.Module, total_steps: int) -> None:
        """Prepare a training run of so many optimizer steps.

        A resumed run calls it again, after the checkpoint was loaded: set what follows from
        ``total_steps``, and reset nothing that was trained.
        """

    def on_step(self, step: int) -> None:
        """Act after the optimizer's step number ``step``, counted from 1; ``.grad`` is there."""

    def extra_loss(self) -> Tensor | None:
        """Return a scalar that is added to the loss of a step, with a gradient; None for none."""
        return None


NAMES = ("fit", "on_train_start", "on_step", "extra_loss")


def overridden(method: TrainingHooks) -> set[str]:
    """Return the names of the hooks that a method overrides."""
    kind: Any = type(method)
    return {name for name in NAMES if getattr(kind, name) is not getattr(TrainingHooks, name)}


def bound(method: M, modules: Sequence[nn.Module]) -> M:
    """Return a copy of a method, of which these modules are the inserted ones."""
    made = copy.copy(method)
    object.__setattr__(made, "_inserted", tuple(modules))
    return made
