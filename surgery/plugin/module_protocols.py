"""What an inserted module may offer beside its forward, as protocols.

An inserted module is an ``nn.Module``. Each protocol below is optional and stands alone: a module
offers it by having the attribute, with no base class. The library asks for these names only, so
:func:`surgery.plugin.insertion_check.require_no_near_miss` reports a name that is almost one of
them when the module is inserted.

    offer              asked by                           what for
    forward(..., onto) the graph, at ``add``              the module returns the sum itself
    first_factor,      the graph                          modules that read one value share a
    after_product                                         product
    total_lse          later methods that read ``lse``    virtual keys are counted
    leading_keys       the graph, while it decodes        virtual keys stand first in the cache
    fold, fold_input   surgery.merge                      the update goes into the weights
    forward_grouped    surgery.route                      many adapters of a batch run as one
    rest, needs_bias   surgery.merge                      what stays, and what a fold needs
    low_rank_factors   surgery.combine                    the update is a low-rank product
    divided_axes       surgery.splice                     tensor parallelism divides the module
    trial_tokens       surgery.splice                     ids that show a module's effect
    plain_state        surgery.save                       what inference needs, instead of all
    no_weight_decay    surgery.parameter_groups           parameters that do not decay
    fast_parameters    surgery.parameter_groups           parameters that LoRA+ trains faster
    learning_rates     surgery.parameter_groups           rates of single parameters
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn


class AddsOnto(Protocol):
    """A module that adds its update to the port itself (verb ``add``).

        forward(x, onto=y) = y + update(x)          forward(x) = update(x)

    The graph then holds one operator where it would hold two, and a scale costs nothing
    (``torch.add(y, update, alpha=scale)``). The result has the dtype of ``onto``. The graph passes
    ``onto`` only where the port is the whole output of a projection, token by token; elsewhere it
    adds the update itself, so ``onto`` must default to None.

    Example:
        ``def forward(self, x, onto=None): return self.up(x) + (0 if onto is None else onto)``
    """

    def forward(self, *reads: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return ``onto`` plus the update, or the update alone."""


@runtime_checkable
class StartsWithProduct(Protocol):
    """A module whose forward begins with a product ``x A^T``, and needs ``x`` no more.

        forward(x, onto) = after_product(x @ A.T, onto)        A (r, d_in)

    Modules at several ports that read the same value, of whatever methods and splices, then share
    one product with their stacked factors. The module is an :class:`AddsOnto` with the verb ``add``
    and one read. Its forward is called as ever where it has hooks.

    Example:
        ``def first_factor(self): return None if self.dropping else self.a``
    """

    def first_factor(self) -> Tensor | None:
        """Return A; None if the forward does something else now, such as dropout on ``x``."""

    def after_product(self, hidden: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return what forward returns, from ``hidden = x @ A.T``."""


@runtime_checkable
class CountsVirtualKeys(Protocol):
    """A module that replaces ``merged`` and attends to keys of its own.

        total_lse(*reads) = log(exp(lse) + sum_j exp(s_j))      s_j: scores of the virtual keys

    Methods later in the list read this value as ``lse``, so their keys share one softmax with
    these. :func:`surgery.virtual_lse` computes it.

    Example:
        ``def total_lse(self, merged, lse): return torch.logaddexp(lse, self.score)``
    """

    def total_lse(self, *reads: Tensor) -> Tensor:
        """Return the logsumexp (B, H, n) over real and virtual keys; same reads as ``forward``."""


@runtime_checkable
class LeadsCache(Protocol):
    """A module that replaces ``merged`` and attends to keys of its own, as to any other key.

        forward(merged, query, lse, ...) = the context of one softmax over [P_k ; K]

    A graph that decodes without gradients then puts them in front of the keys of the KV cache,
    where it can (surgery/rewrite/leading.py). It calls forward elsewhere.

    Example:
        ``def leading_keys(self): return self.keys, self.values``
    """

    def leading_keys(self) -> tuple[Tensor, Tensor] | None:
        """Return P_k (G, P, d) and P_v (G, P, d_v); None if forward does something else now.

        The very same tuple is returned while its tensors hold what forward uses, apart from writes
        that their version counters show.
        """


@runtime_checkable
class Foldable(Protocol):
    """A module behind a projection ``y = x W + b`` whose result is again ``x W' + b'``.

    ``surgery.merge`` calls ``fold`` in float64 and rounds once. Verbs: ``add``, ``insert`` and
    ``replace``.

    Example:
        ``def fold(self, weight, bias): return weight * self.scale, bias``
    """

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return ``(W', b')`` of the same shapes: W (in, out), b (out,) or None."""


@runtime_checkable
class FoldableInput(Protocol):
    """A module in front of a projection, ``y = m(x) W + b``, linear in x (verb ``feed``).

    Example:
        ``def fold_input(self, weight): return self.scale[:, None] * weight``
    """

    def fold_input(self, weight: Tensor) -> Tensor:
        """Return ``W'`` (in, out) with ``x W' = m(x) W``."""


@runtime_checkable
class PartlyFoldable(Protocol):
    """A :class:`Foldable` module of which a part is not linear and stays spliced.

    ``surgery.merge(model, partial=True)`` folds the linear part and then calls ``rest``.

    Example:
        ``def rest(self): torch.nn.init.zeros_(self.bias)``
    """

    def rest(self) -> None:
        """Remove the part that has been folded from this module, in place."""


@runtime_checkable
class NeedsBias(Protocol):
    """A :class:`Foldable` module that has a bias of its own to fold.

    Where ``needs_bias`` is true, ``surgery.merge`` refuses a projection without a bias.

    Example:
        ``needs_bias = True``
    """

    needs_bias: bool


@runtime_checkable
class Reparametrised(Protocol):
    """A module whose trained parameters are not the ones that inference needs.

    A prefix that an MLP makes is stored as plain keys and values: ``plain_state`` returns the
    ``state_dict`` of the module that ``Method.plain()`` would insert in its place.

    Example:
        ``def plain_state(self): return {"keys": self.mlp(self.table)}``
    """

    def plain_state(self) -> dict[str, Tensor]:
        """Return the tensors to store, by name; tensors of the module itself are not copied."""


@runtime_checkable
class Factored(Protocol):
    """A module whose whole update is a product ``s x A^T B``, with A (r, in) and B (r, out).

    ``surgery.combine`` makes one of several. Its method has ``at_rank(r)``: the method that makes
    such modules of rank r whose factors are A and B as they are, with no scale.

    Example:
        ``def low_rank_factors(self): return self.a, self.b, self.scale``
    """

    def low_rank_factors(self) -> tuple[Tensor, Tensor, float] | None:
        """Return A, B and s; None if there is more to the update."""

    def set_low_rank_factors(self, a: Tensor, b: Tensor) -> None:
        """Hold these factors from now on; s is 1."""


@runtime_checkable
class Divisible(Protocol):
    """A module that updates a projection which tensor parallelism may divide (verb ``add``).

    Each process then has a part of the projection's input features, or of its output features, and
    parts of the module's parameters. Its forward reads them by ``surgery.own_part(parameter)`` and
    sums between two factors by ``surgery.sum_between(hidden, a, b)``; both do nothing to a model
    that is not divided. ``surgery.splice`` compares output and gradients with those of a single
    process.

    Example:
        ``def divided_axes(self, side): return {"a": 1} if side == "input" else {"b": 0}``
    """

    def divided_axes(self, side: str) -> dict[str, int]:
        """Return the axis along which each parameter is divided, by its name; others stay whole.

        ``side`` is ``input`` where a process is given a part of x, and ``output`` where it returns
        a part of y.
        """


@runtime_checkable
class RunsGrouped(Protocol):
    """A module of which several can run at once, each for rows of its own.

    ``surgery.route`` then runs all adapters of a batch in as many operators as one. It asks only
    for modules of one class, dtype and mode, of which none has hooks, and only where the module
    has one input (verbs ``add``, ``insert`` and ``feed``). Others run one after the other.

    Example:
        ``def forward_grouped(modules, x, onto=None): return None``
    """

    @staticmethod
    def forward_grouped(
        modules: Sequence[nn.Module], x: Tensor, onto: Tensor | None = None
    ) -> Tensor | None:
        """Return what the i-th module makes of the i-th of len(modules) equal parts of x's rows.

        ``onto`` is there for a module that is an :class:`AddsOnto`. None means that these modules
        do not run as one.
        """


@runtime_checkable
class ActsOnTokens(Protocol):
    """A module that changes the rows of some tokens alone.

    ``surgery.splice`` verifies that a module has an effect. Where the example has none of these
    tokens, it tries them.

    Example:
        ``def trial_tokens(self): return self.tokens[:4]``
    """

    def trial_tokens(self) -> Tensor:
        """Return some of these tokens, (k,)."""


@runtime_checkable
class NamesUndecayed(Protocol):
    """A module with parameters that weight decay must leave alone, such as biases.

    ``surgery.parameter_groups`` and the recipes' trainer ask for it; other trainers may.

    Example:
        ``def no_weight_decay(self): return {"bias"}``
    """

    def no_weight_decay(self) -> set[str]:
        """Return names of own parameters, as in ``named_parameters()`` of this module."""


@runtime_checkable
class NamesFast(Protocol):
    """A module with parameters that LoRA+ trains at a multiple of the learning rate.

    They are the factor B of a product A B that starts at zero (arXiv:2402.12354).

    Example:
        ``def fast_parameters(self): return {"b"}``
    """

    def fast_parameters(self) -> set[str]:
        """Return names of own parameters, as in ``named_parameters()`` of this module."""


@runtime_checkable
class NamesRates(Protocol):
    """A module with parameters that learn at rates of their own.

    Example:
        ``def learning_rates(self): return {"b": 16.0}``
    """

    def learning_rates(self) -> Mapping[str, float]:
        """Return by own parameter how many times as large its learning rate is."""
