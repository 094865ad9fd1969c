"""List the protocols of inserted modules, and the arguments that their methods take."""

from __future__ import annotations

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

PROTOCOLS: tuple[type, ...] = (
    AddsOnto, StartsWithProduct, CountsVirtualKeys, LeadsCache, Foldable, FoldableInput,
    PartlyFoldable, NeedsBias, Reparametrised, Factored, Divisible, RunsGrouped, ActsOnTokens,
    NamesUndecayed, NamesFast, NamesRates,
)  # fmt: skip

METHODS: dict[str, tuple[object, ...] | None] = {  # total_lse: as many arguments as ``reads``
    "first_factor": (), "after_product": (None,), "total_lse": None, "leading_keys": (),
    "fold": (None, None), "fold_input": (None,), "rest": (), "low_rank_factors": (),
    "set_low_rank_factors": (None, None), "divided_axes": ("input",),
    "forward_grouped": (None, None), "trial_tokens": (), "plain_state": (), "no_weight_decay": (),
    "fast_parameters": (), "learning_rates": (),
}  # fmt: skip
