"""List the laws of the contract, each under the short name by which it can be exempted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import surgery
from surgery.testing import running_laws, storing_laws, training_laws
from surgery.testing.shapes import Shape


@dataclass(frozen=True)
class Law:
    """One law of the contract.

    Attributes:
        name: the short name, as in ``exempt={"cached": "acts on the last tokens"}``.
        check: raises an AssertionError unless a method keeps the law on a model.
    """

    name: str
    check: Callable[[surgery.Method, Shape], None]

    @property
    def sentence(self) -> str:
        """The law in words."""
        return self.check.__name__.replace("_", " ")


LAWS = (
    Law("registered", storing_laws.every_tensor_is_registered),
    Law("start", running_laws.start_is_as_declared),
    Law("gradients", training_laws.gradients_reach_what_was_inserted_and_nothing_else),
    Law("learns", training_laws.every_parameter_can_learn),
    Law("cached", running_laws.cached_equals_uncached),
    Law("padding", running_laws.padding_and_batch_do_not_matter),
    Law("hooks", running_laws.hooks_change_nothing),
    Law("saved", storing_laws.saved_and_loaded_is_the_same),
    Law("removed", storing_laws.switched_off_and_removed_the_base_is_back),
    Law("merged", storing_laws.merged_is_the_same_or_refused),
    Law("dtype", running_laws.dtype_and_device_follow_the_site),
    Law("options", storing_laws.options_survive_json),
)
