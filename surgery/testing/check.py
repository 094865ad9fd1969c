"""Check the contract of a method: every law on every model, or the reason why not.

from surgery.testing import check_method

def test_the_contract() -> None:
    check_method(MyMethod(rank=4))

PYTEST_DONT_REWRITE: the messages are whole as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import surgery
from surgery.errors import suggest
from surgery.testing.laws import LAWS, Law
from surgery.testing.shapes import MORE_SHAPES, SHAPES, Shape, shape_of
from surgery.testing.trials import fresh


@dataclass
class Contract:
    """The result of ``check_method``. Print it.

    Attributes:
        held: the laws that hold, by model.
        refused: why the method cannot be spliced into a model, by model.
        exempt: the laws that were not tried and why, by model.
    """

    held: dict[str, list[str]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    exempt: dict[str, dict[str, str]] = field(default_factory=dict)

    def __repr__(self) -> str:
        lines = []
        for shape, laws in self.held.items():
            lines.append(f"{shape}: {len(laws)} laws hold")
            for law, reason in self.exempt.get(shape, {}).items():
                lines.append(f"  not tried: {law} ({reason})")
        lines += [f"{shape}: refused: {reason}" for shape, reason in self.refused.items()]
        return "\n".join(lines)


def check_method(
    method: surgery.Method | str,
    shapes: Sequence[str | Shape] = (),
    exempt: Mapping[str, str] | None = None,
) -> Contract:
    """Check the contract of a method on small models.

    * registered: every tensor of an inserted module is a parameter or a buffer.
    * start: it is as declared, in evaluation and in training, with and without padding.
    * gradients: one reaches every inserted parameter and no parameter of the base. A parameter
      with ``requires_grad=False`` stays frozen.
    * learns: a few steps from the start give every parameter a gradient that is not zero.
    * cached: a sequence in three steps through a KV cache has the outputs of one step.
    * padding: the outputs of a row do not depend on its batch and its padding.
    * hooks: an inserted module computes the same with a hook on it.
    * saved: a saved adapter, loaded into a fresh base, gives the same bits.
    * removed: switched off, and after removal, the model gives the bits of the base.
    * merged: a merge keeps the outputs, or is refused with the name of the method.
    * dtype: inserted modules have the device of their site, and its dtype, but float32 in place of
      half precision; the output has the base's dtype.
    * options: they survive JSON.

    Args:
        method: the method, with any options; a name stands for the method with its defaults.
        shapes: the models to check it on: names of ``surgery.testing.shapes``, or a ``Shape`` with
            a model and inputs of your own. By default ``fused``, ``grouped`` and ``encoder``; a
            method that suits none of them is tried on ``eager``, ``encoder_decoder`` and
            ``vision``.
        exempt: the laws that do not apply to the method, each with the reason:
            ``{"cached": "acts on the last tokens"}``. The result shows them.

    Returns:
        the laws that hold. A model that lacks a site or port which the method needs is noted as
        refused. A law that cannot be tried on a model is noted as exempt.

    Raises:
        AssertionError: a law does not hold, or no model can be spliced; the message names the law
            and the model.
        SpliceError: a splice is refused for another reason.
    """
    contract = Contract()
    for asked in [shapes] if shapes else [SHAPES, MORE_SHAPES]:
        for shape, law, reason in _tried(method, asked, exempt or {}):
            if law is None:
                contract.refused[shape] = reason
            elif reason:
                contract.exempt.setdefault(shape, {})[law.name] = reason
            else:
                contract.held.setdefault(shape, []).append(law.sentence)
        if contract.held:
            return contract
    raise AssertionError(f"{method} cannot be spliced into any model: {contract.refused}")


def _tried(
    method: surgery.Method | str, shapes: Sequence[str | Shape], exempt: Mapping[str, str]
) -> Iterator[tuple[str, Law | None, str]]:
    """Try each law on each model.

    Yields:
        the model's name, the law, and ''; or the reason why the law is not tried. No law and a
        reason mean that the method cannot be spliced into the model.

    Raises:
        AssertionError: as ``check_method`` does.
    """
    made = _method(method)
    for name in exempt:
        names = [law.name for law in LAWS]
        assert name in names, f"no law {name!r}. {suggest(name, names)}Laws: {', '.join(names)}."
        assert exempt[name], f"exempt: say why the law {name!r} does not apply."
    for shape in map(shape_of, shapes):
        try:
            fresh(made, shape)
        except (surgery.SiteError, surgery.PortError) as error:
            yield shape.name, None, str(error)
            continue
        for law in LAWS:
            reason = exempt.get(law.name) or shape.lacks.get(law.name, "")
            if not reason:
                _try(law, made, shape)
            yield shape.name, law, reason


def _try(law: Law, method: surgery.Method, shape: Shape) -> None:
    """Raise an AssertionError that names the law and the model unless the law holds."""
    try:
        law.check(method, shape)
    except AssertionError as error:
        raise AssertionError(f"{method} on {shape.name}: {law.sentence}: {error}") from error
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise AssertionError(f"{method} on {shape.name}: {law.sentence}: {what}") from error


def _method(method: surgery.Method | str) -> surgery.Method:
    """Return the method, made from its name if that is given."""
    if isinstance(method, str):
        return surgery.method(method)
    if isinstance(method, type):
        raise AssertionError(
            f"check_method was given the class {method.__name__}. Pass an object of it: "
            f"check_method({method.__name__}())."
        )
    return method
